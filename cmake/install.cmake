# The C++ library for find_package(moefuse): cmake --install BUILD --prefix PREFIX --component cpp
include(CMakePackageConfigHelpers)
include(GNUInstallDirs)
set(MOEFUSE_CMAKE_DIR ${CMAKE_INSTALL_LIBDIR}/cmake/moefuse)

configure_file(cmake/moefuseConfig.cmake moefuseConfig.cmake @ONLY)
# A 0.x minor version may change the interface.
write_basic_package_version_file(moefuseConfigVersion.cmake COMPATIBILITY SameMinorVersion)
install(TARGETS moefuse EXPORT moefuse
        ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT cpp
        INCLUDES DESTINATION ${CMAKE_INSTALL_INCLUDEDIR})
install(DIRECTORY include/moefuse DESTINATION ${CMAKE_INSTALL_INCLUDEDIR} COMPONENT cpp)
install(EXPORT moefuse FILE moefuseTargets.cmake NAMESPACE moefuse::
        DESTINATION ${MOEFUSE_CMAKE_DIR} COMPONENT cpp)
install(FILES ${CMAKE_CURRENT_BINARY_DIR}/moefuseConfig.cmake
              ${CMAKE_CURRENT_BINARY_DIR}/moefuseConfigVersion.cmake
        DESTINATION ${MOEFUSE_CMAKE_DIR} COMPONENT cpp)
