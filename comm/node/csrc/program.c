/* Additions in an order, block by block, so that what is between stays in the nearest cache. */
#include "node.h"

#include <string.h>

enum { BLOCK = 512 };

typedef float loose_float __attribute__((aligned(1))); /* Python's arrays may stand anywhere */

static void add(loose_float *sum, const loose_float *left, const loose_float *right, int64_t count) {
#ifdef __GNUC__
#pragma GCC ivdep
#endif
    for (int64_t i = 0; i < count; i++) sum[i] = left[i] + right[i];
}

void hpc_evaluate(const hpc_program *program, const float *const *inputs, float *const *outs, int64_t count) {
    float registers[HPC_REGISTERS][BLOCK];
    const int64_t num_inputs = program->num_inputs, num_outputs = program->num_outputs;
    float *operands[num_inputs + HPC_REGISTERS + num_outputs];
    for (int64_t i = 0; i < HPC_REGISTERS; i++) operands[num_inputs + i] = registers[i];
    for (int64_t first = 0; first < count; first += BLOCK) {
        const int64_t length = count - first < BLOCK ? count - first : BLOCK;
        for (int64_t i = 0; i < num_inputs; i++) operands[i] = (float *)inputs[i] + first;
        for (int64_t i = 0; i < num_outputs; i++) operands[num_inputs + HPC_REGISTERS + i] = outs[i] + first;
        for (int64_t i = 0; i < program->num_steps; i++) {
            const int32_t *step = program->steps + 3 * i;
            if (step[2] < 0)
                memcpy(operands[step[0]], operands[step[1]], (size_t)length * sizeof(float));
            else
                add(operands[step[0]], operands[step[1]], operands[step[2]], length);
        }
    }
}
