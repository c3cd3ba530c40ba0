/* Everything, in the order of use. An isa_*.c file names its table in HPC_TABLE and includes its simd_*.h. */
#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "vmath.h"      /* exp */
#include "rows.h"       /* norms, SiLU, quantisation of rows */
#include "products.h"   /* the register tiles, the tree over grains */
#include "cache.h"      /* KV cache, rotary embedding */
#include "attention.h"
#include "logits.h"     /* embedding, maxima, exp-sums, the largest */
#include "drawing.h"    /* the choice of an id */
#include "layer.h"      /* the calls that Python makes */
#include "parts.h"      /* single steps of them, for tests; the table of all functions */
