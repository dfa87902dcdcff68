//! The families, one file each.

mod chain;
#[cfg(test)]
mod tests;

use crate::Family;

/// All families, in the order of lists.
static FAMILIES: [&dyn Family; 1] = [&chain::Chain];

/// All families, in the order of lists.
pub fn families() -> &'static [&'static dyn Family] {
    &FAMILIES
}

/// The family of a name.
pub fn family(name: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.name() == name)
}
