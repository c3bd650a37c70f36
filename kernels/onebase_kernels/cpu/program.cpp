// The ops of a whole step, one after the other: between them there is nothing but a call.

#include "simd.h"
#include "step.h"

namespace onebase {

struct Op {
    void (*run)(const void* call, const Step* step);
    const void* call;
};

}  // namespace onebase

ONEBASE_EXPORT void onebase_run_program(const onebase::Op* ops, int64_t num_ops, const onebase::Step* step) {
    for (int64_t i = 0; i < num_ops; i++) ops[i].run(ops[i].call, step);
}
