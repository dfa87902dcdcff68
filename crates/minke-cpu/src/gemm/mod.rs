//! Matrix products: the three of a linear layer, grouped over experts.

pub mod tile;
