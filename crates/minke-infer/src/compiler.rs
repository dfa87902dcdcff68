//! Constraints on their way to a grammar, for whoever asks: what that takes is no time of the model's.

use std::sync::OnceLock;

use minke_data::Tokenizer;

use crate::constrain::{Constraint, ConstraintError, Grammar, Grammars};

/// Compiles constraints over the vocabulary of one model.
pub(crate) struct Compiler {
    tokenizer: Option<Tokenizer>,
    /// Rows of the model's table.
    rows: usize,
    /// Made for the first constraint.
    grammars: OnceLock<Result<Grammars, ConstraintError>>,
}

impl Compiler {
    /// Of a model with so many rows; without a tokenizer there are no constraints.
    pub fn new(tokenizer: Option<&Tokenizer>, rows: usize) -> Self {
        Self { tokenizer: tokenizer.cloned(), rows, grammars: OnceLock::new() }
    }

    /// Compiles a constraint.
    ///
    /// # Errors
    /// There is no tokenizer that it could be over, or it is too large, too deep, too complex, or wrong.
    pub fn compile(&self, constraint: &Constraint) -> Result<Form, ConstraintError> {
        let tokenizer = self.tokenizer.as_ref().ok_or(ConstraintError::NeedsTokenizer)?;
        let grammars = self.grammars.get_or_init(|| Grammars::new(tokenizer, self.rows));
        grammars.as_ref().map_err(Clone::clone)?.compile(constraint).map(Form)
    }
}

/// A constraint, compiled; copies share nothing.
#[derive(Debug, Clone)]
pub struct Form(pub(crate) Grammar);
