# find_package(moefuse): the target moefuse::moefuse. MLX is found in the current Python unless
# MLX_ROOT or CMAKE_PREFIX_PATH already leads to it.
include(CMakeFindDependencyMacro)
find_package(MLX CONFIG QUIET)
if(NOT MLX_FOUND)
  find_package(Python QUIET COMPONENTS Interpreter)
  if(Python_Interpreter_FOUND)
    execute_process(COMMAND "${Python_EXECUTABLE}" -m mlx --cmake-dir OUTPUT_VARIABLE MLX_ROOT
                    OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
  endif()
  find_dependency(MLX CONFIG)
endif()
find_dependency(Threads)
include("${CMAKE_CURRENT_LIST_DIR}/moefuseTargets.cmake")
