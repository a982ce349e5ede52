// CUDA's own kernel texts for the emulator, beside those that all devices share. Comes before
// emulated_backend.h.
#pragma once

#define EMULATED_KERNELS(KERNEL) \
  MOEFUSE_KERNELS(KERNEL) MOEFUSE_GRID_KERNELS(KERNEL) MOEFUSE_CLUSTER_KERNELS(KERNEL)

#include "dialect_host.h"
#include "tensor_dialect_host.h"
#include "tensor_signatures.h"

#define DEVICE_FUNCTION
#define IN(type, name, count) emulator::Pointer<const type> name;
#define OUT(type, name, count) emulator::Pointer<type> name;
#include "callables.h"
// The texts above come first.
#include "attend.h"
#include "attend_grouped.h"
#include "attend_latent.h"
#include "grid.h"
#include "head.h"
#include "route.h"
#include "sample.h"
#include "select.h"
#include "stretches.h"
#include "tensor_callables.h"
#undef IN
#undef OUT
#include "kernels.h"
