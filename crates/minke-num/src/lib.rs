//! Numbers: bf16, counter-based random numbers, tolerances
