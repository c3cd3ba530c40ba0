"""What `hpcinfer doctor` looks at: facts of every rank, measurements between them, and the findings they lead to."""
