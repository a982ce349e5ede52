// One kernel table. The build compiles this file once for each instruction set, with its flags and
// its name in MOEFUSE_ISA; dialect.h holds all that differs.
#include "cpu/dialect.h"
#include "cpu/tables.h"
// The texts, in internal linkage for the reason given in lanes.h.
#include "cpu/combine.inl"
#include "cpu/exact.inl"
#include "cpu/grid.inl"
#include "cpu/read.inl"
#include "cpu/swiglu.inl"
// Needs swiglu.inl's exponential.
#include "cpu/attention.inl"

namespace moefuse::cpu {

#define MOEFUSE_NAME_(isa) #isa
#define MOEFUSE_NAME(isa) MOEFUSE_NAME_(isa)
#define MOEFUSE_TABLE_(isa) kKernels_##isa
#define MOEFUSE_TABLE(isa) MOEFUSE_TABLE_(isa)

const Kernels MOEFUSE_TABLE(MOEFUSE_ISA) = {
    .isa = MOEFUSE_NAME(MOEFUSE_ISA),
    .exact_qmv = exact_qmv,
    .exact_swiglu = exact_swiglu,
    .combine = combine,
    .prepared_bytes = prepared_bytes,
    .prepare = prepare,
    .qmv = qmv,
    .swiglu = swiglu,
    .dots = dots,
    .weighted_sum = weighted_sum,
    .exponentials = exponentials,
    .rms_norm = rms_norm,
    .read = read,
};

}  // namespace moefuse::cpu
