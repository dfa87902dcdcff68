//! One way to compare two arrays.
//!
//! NaN and infinity must stand in the same places; then every element is within `absolute + relative * |expected|`;
//! the worst offender is named. A comparison that passes on NaN, or that only looks at a mean, is worse than none.

/// How far an element may be from what was expected: `absolute + relative * |expected|`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// In the units of the compared values.
    pub absolute: f64,
    /// As a share of the expected value's magnitude.
    pub relative: f64,
}

impl Tolerance {
    /// A bound with an absolute and a relative part.
    pub const fn new(absolute: f64, relative: f64) -> Self {
        Self { absolute, relative }
    }

    /// f32 sums of `depth` terms of about `scale` each against an f64 reference: rounding errors of a chain of
    /// `depth` additions, eight standard deviations wide.
    pub fn f32_sum(depth: usize, scale: f64) -> Self {
        let eps = f64::from(f32::EPSILON);
        Self { absolute: 8.0 * eps * scale * (depth as f64).sqrt().max(1.0) + 1e-30, relative: 8.0 * eps }
    }

    /// Compares and names the worst element; `Err` holds a sentence for a test's panic message.
    pub fn check(&self, what: &str, got: &[f32], expected: &[f64]) -> Result<(), String> {
        if got.len() != expected.len() {
            return Err(format!("{what}: got {} elements, expected {}", got.len(), expected.len()));
        }
        let mut worst = (0.0, 0);
        for (i, (&g, &e)) in got.iter().zip(expected).enumerate() {
            let g = f64::from(g);
            if g.is_nan() != e.is_nan() || (g.is_infinite() || e.is_infinite()) && g != e {
                return Err(format!("{what}[{i}]: got {g}, expected {e}"));
            }
            if g.is_nan() || g == e {
                continue;
            }
            let excess = (g - e).abs() / (self.absolute + self.relative * e.abs());
            if excess > worst.0 {
                worst = (excess, i);
            }
        }
        let (excess, i) = worst;
        if excess > 1.0 {
            let (g, e) = (got[i], expected[i]);
            return Err(format!("{what}[{i}]: got {g}, expected {e}: {excess:.2} times the bound {self:?}"));
        }
        Ok(())
    }

    /// Like [`Tolerance::check`] against an f32 reference.
    pub fn check_f32(&self, what: &str, got: &[f32], expected: &[f32]) -> Result<(), String> {
        self.check(what, got, &expected.iter().map(|&x| f64::from(x)).collect::<Vec<_>>())
    }
}

/// Panics with the index and both bit patterns where two arrays are not the same to the bit.
///
/// # Panics
/// When lengths or any bits differ.
pub fn assert_same_bits(what: &str, got: &[f32], expected: &[f32]) {
    assert_eq!(got.len(), expected.len(), "{what}: lengths differ");
    for (i, (g, e)) in got.iter().zip(expected).enumerate() {
        assert!(
            g.to_bits() == e.to_bits(),
            "{what}[{i}]: got {g} ({:08x}), expected {e} ({:08x})",
            g.to_bits(),
            e.to_bits()
        );
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn finds_what_is_wrong() {
        let t = Tolerance::new(1e-3, 0.0);
        assert!(t.check("x", &[1.0, 2.0], &[1.0005, 2.0]).is_ok());
        assert!(t.check("x", &[1.0, 2.0], &[1.002, 2.0]).is_err());
        assert!(t.check("x", &[f32::NAN], &[1.0]).is_err());
        assert!(t.check("x", &[1.0], &[f64::NAN]).is_err());
        assert!(t.check("x", &[f32::INFINITY], &[f64::NEG_INFINITY]).is_err());
        assert!(t.check("x", &[1.0], &[1.0, 1.0]).is_err());
    }
}
