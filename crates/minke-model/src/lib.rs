//! The one transformer, built from config.json

pub mod config;
pub mod spec;
