# One kernel table (src/cpu/isa.cpp), compiled once for each instruction set. cpu/dispatch.cpp
# picks at load. Every build gives the same bits: the texts fix the order of every sum.
set(MOEFUSE_ISAS plain)
set(MOEFUSE_FLAGS_plain "")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  list(APPEND MOEFUSE_ISAS avx2 avx512)
  set(MOEFUSE_FLAGS_avx2 -mavx2 -mfma -mf16c)
  set(MOEFUSE_FLAGS_avx512 -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mfma -mf16c
      -mprefer-vector-width=512)
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64")
  list(APPEND MOEFUSE_ISAS neon)
  set(MOEFUSE_FLAGS_neon -march=armv8.2-a+dotprod+fp16)
endif()

set(MOEFUSE_KERNELS_AT -O3)
if(MOEFUSE_SANITIZE)  # the sanitizers' own -O1: three minutes less of the compiler
  set(MOEFUSE_KERNELS_AT)
endif()
set(MOEFUSE_ISA_OBJECTS)
foreach(isa ${MOEFUSE_ISAS})
  add_library(moefuse_${isa} OBJECT src/cpu/isa.cpp)
  target_compile_definitions(moefuse_${isa} PRIVATE MOEFUSE_ISA=${isa})
  target_include_directories(moefuse_${isa} PRIVATE src include)
  target_compile_options(moefuse_${isa} PRIVATE ${MOEFUSE_KERNELS_AT} ${MOEFUSE_FLAGS_${isa}} -Wno-psabi
      -Wno-maybe-uninitialized)  # GCC 12 warns about its own AVX-512 headers
  # plain takes its vectors apart: watched, it is 110 MB of code and five minutes of the compiler,
  # for texts that the other tables have too.
  if(MOEFUSE_SANITIZE AND isa STREQUAL "plain" AND "avx2" IN_LIST MOEFUSE_ISAS)
    target_compile_options(moefuse_plain PRIVATE -fno-sanitize=all)
  endif()
  list(APPEND MOEFUSE_ISA_OBJECTS $<TARGET_OBJECTS:moefuse_${isa}>)
  string(TOUPPER ${isa} name)
  add_compile_definitions(MOEFUSE_HAS_${name})
endforeach()

# Tiles of bfloat16 (AMX): Linux asks for their use, and older compilers do not know them.
if(CMAKE_SYSTEM_NAME STREQUAL Linux AND "avx512" IN_LIST MOEFUSE_ISAS)
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mamx-bf16 -mavx512bf16" MOEFUSE_COMPILES_TILES)
  if(MOEFUSE_COMPILES_TILES)
    add_library(moefuse_tiles OBJECT src/cpu/tiles.cpp)
    target_include_directories(moefuse_tiles PRIVATE src include)
    target_compile_options(moefuse_tiles PRIVATE -O3 ${MOEFUSE_FLAGS_avx512} -mavx512bf16 -mamx-tile
        -mamx-bf16 -Wno-psabi -Wno-maybe-uninitialized)
    list(APPEND MOEFUSE_ISA_OBJECTS $<TARGET_OBJECTS:moefuse_tiles>)
    add_compile_definitions(MOEFUSE_HAS_TILES)
  endif()
endif()
