//! The one transformer, built from config.json
