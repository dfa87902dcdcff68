//! Tensor, coarse operations with forward and backward, and the tape
