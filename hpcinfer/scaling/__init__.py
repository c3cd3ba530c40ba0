"""`hpcinfer study`: points of a scaling study, their runs, what they come to. Needs neither MPI nor torch."""
