//! The families, one file each.

mod addition;
mod base;
mod calendar;
mod chain;
mod count;
mod countdown;
mod dates;
mod division;
mod equation;
mod fractions;
mod knights;
mod maze;
mod multiplication;
mod orders;
mod reverse;
mod shared;
mod shop;
mod sort;
mod spell;
mod sudoku;
mod syllogism;
#[cfg(test)]
mod tests;
mod words;

use crate::Family;

/// All families, in the order of lists.
static FAMILIES: &[&dyn Family] = &[
    &chain::Chain,
    // arithmetic
    &addition::Addition,
    &multiplication::Multiplication,
    &division::Division,
    &fractions::Fractions,
    &base::Base,
    &equation::Equation,
    &countdown::Countdown,
    &shop::Shop,
    // strings and lists
    &sort::Sort,
    &count::Count,
    &reverse::Reverse,
    &spell::Spell,
    // the calendar
    &dates::Dates,
    // puzzles
    &knights::Knights,
    &sudoku::Sudoku,
    &maze::Maze,
    &syllogism::Syllogism,
];

/// All families, in the order of lists.
pub fn families() -> &'static [&'static dyn Family] {
    FAMILIES
}

/// The family of a name.
pub fn family(name: &str) -> Option<&'static dyn Family> {
    FAMILIES.iter().copied().find(|family| family.name() == name)
}
