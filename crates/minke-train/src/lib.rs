//! Training: recipes, optimizers, the loop, checkpoints, reports
