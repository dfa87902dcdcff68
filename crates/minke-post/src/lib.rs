//! From a base model to one that thinks.
