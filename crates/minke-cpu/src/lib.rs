//! CPU kernels on slices with run-time dispatch, and the thread pool
