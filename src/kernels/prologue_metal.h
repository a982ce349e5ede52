// Opens every kernel body on Metal: fast::metal_kernel adds to the signature the attributes that it
// finds by name in the body's text.
const uint group_x = threadgroup_position_in_grid.x;
const uint group_y = threadgroup_position_in_grid.y;
const uint group_z = threadgroup_position_in_grid.z;
const uint lane_id = thread_index_in_simdgroup;
const uint simd_id = simdgroup_index_in_threadgroup;
const uint thread_id = thread_index_in_threadgroup;
