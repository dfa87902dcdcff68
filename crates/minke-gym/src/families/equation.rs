//! Linear equations: `3x+4=x+10`.

use num_bigint::BigInt;
use num_rational::{BigRational, Ratio};

use super::shared::read;
use crate::{Care, Draw, Family, Work, number};

/// See the module.
pub struct Equation;

/// Reads `A B C D` of `Ax+B=Cx+D`.
fn parts(key: &str) -> [i64; 4] {
    let mut words = key.split(' ').map(read);
    std::array::from_fn(|_| words.next().expect("a key of this family"))
}

fn solution([a, b, c, d]: [i64; 4]) -> Ratio<i64> {
    Ratio::new(d - b, a - c)
}

/// `Ax`, as people write it.
fn unknowns(a: i64) -> String {
    match a {
        1 => "x".to_owned(),
        -1 => "-x".to_owned(),
        _ => format!("{a}x"),
    }
}

/// One side: `Ax+B`.
fn side(a: i64, b: i64) -> String {
    match (a, b) {
        (0, b) => b.to_string(),
        (a, 0) => unknowns(a),
        (a, b) => format!("{}{b:+}", unknowns(a)),
    }
}

/// `x-y`, with the signs that this takes.
fn minus(x: &str, y: &str) -> String {
    match y.strip_prefix('-') {
        Some(y) => format!("{x}+{y}"),
        None => format!("{x}-{y}"),
    }
}

fn shown([a, b, c, d]: [i64; 4]) -> String {
    format!("{}={}", side(a, b), side(c, d))
}

impl Family for Equation {
    fn name(&self) -> &'static str {
        "equation"
    }

    fn about(&self) -> &'static str {
        "solve a linear equation for x: a whole number, or a fraction at some levels"
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let nonzero =
            |most: i64, draw: &mut Draw| draw.between(1, most) * if draw.chance(0.5) { 1 } else { -1 };
        let (a, b, c, x) = match level {
            1 => (1, nonzero(20, draw), 0, draw.between(1, 20)),
            2 => (draw.between(2, 9), nonzero(20, draw), 0, draw.between(1, 9)),
            3 => (draw.between(3, 9), nonzero(20, draw), 0, nonzero(9, draw)),
            _ => (draw.between(3, 12), nonzero(20, draw), nonzero(9, draw), nonzero(12, draw)),
        };
        // more x on the left than on the right: one form of an equation and its mirror image
        let c = if level > 3 { c.min(a - 2) } else { 0 };
        let d = match level {
            1 | 2 | 4 => a * x + b - c * x,
            // whatever it is: the solution may be a fraction
            _ => nonzero(30, draw),
        };
        format!("{a} {b} {c} {d}")
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let shown = shown(parts(key));
        match draw.below(3) {
            0 => format!("Solve {shown}."),
            1 => format!("{shown}, x=?"),
            _ => format!("Find x: {shown}"),
        }
    }

    fn answer(&self, key: &str) -> String {
        solution(parts(key)).to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let solution = solution(parts(key));
        let wanted = BigRational::new(BigInt::from(*solution.numer()), BigInt::from(*solution.denom()));
        let text = answer.trim();
        let value = match text.split_once('=') {
            Some((left, right)) if matches!(left.trim(), "x" | "X") => right,
            Some((left, right)) if matches!(right.trim().trim_end_matches('.'), "x" | "X") => left,
            Some(_) => return false,
            None => text,
        };
        number::parse(value).is_some_and(|got| got == wanted)
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let [a, b, c, d] = parts(key);
        let (times, rest) = (a - c, d - b);
        let value = solution([a, b, c, d]);
        let mut thought = String::new();
        if care == Care::Full {
            if c != 0 {
                thought += &format!("{}={}\n", minus(&unknowns(a), &unknowns(c)), unknowns(times));
            }
            if b != 0 {
                thought += &format!("{}={rest}\n", minus(&d.to_string(), &b.to_string()));
            }
        }
        if care != Care::None {
            thought += &format!("{}={rest}\n", unknowns(times));
            if care == Care::Full && times != 1 {
                thought += &format!("x={rest}/{times}\n");
                thought += &format!("x={value}");
            }
        }
        Some(Work { thought: thought.trim_end().to_owned(), answer: value.to_string() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Equation.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        assert_eq!(shown([3, 4, 1, 10]), "3x+4=x+10");
        assert_eq!(shown([2, -5, -1, 0]), "2x-5=-x");
        assert_eq!(shown([1, 5, 0, 3]), "x+5=3");
        assert_eq!(thought("3 4 1 10", Care::Full), "3x-x=2x\n10-4=6\n2x=6\nx=6/2\nx=3");
        assert_eq!(thought("2 -5 -1 1", Care::Full), "2x+x=3x\n1+5=6\n3x=6\nx=6/3\nx=2");
        assert_eq!(thought("3 4 1 10", Care::Brief), "2x=6");
        assert_eq!(thought("1 5 0 3", Care::Full), "3-5=-2\nx=-2");
        assert_eq!(Equation.answer("4 1 0 -9"), "-5/2");
    }

    #[test]
    fn equal_forms_pass_and_nothing_else() {
        for good in ["3", "x=3", "x = 3", "X = 3.", "3 = x", "3.0", "6/2"] {
            assert!(Equation.verify("3 4 1 10", good), "{good:?}");
        }
        assert!(Equation.verify("4 1 0 -9", "-2.5") && Equation.verify("4 1 0 -9", "x = -5/2"));
        for bad in ["-3", "y=3", "x=", "x", "=3", "2x=6", "3x+4=x+10", "x=3=3", "x=2 or x=3", "x+3"] {
            assert!(!Equation.verify("3 4 1 10", bad), "{bad:?}");
        }
        assert!(!Equation.verify("3 4 1 10", &"x=".repeat(1 << 20)));
    }

    #[test]
    fn solutions_solve() {
        let mut fractions = 0;
        for index in 0..500 {
            let level = 1 + (index % 5) as u32;
            let key = Equation.key(level, &mut Draw::new(3, index));
            let [a, b, c, d] = parts(&key);
            let x = solution([a, b, c, d]);
            assert_eq!(x * a + b, x * c + d, "{key}");
            assert!(a > c && (c != 0) == (level > 3), "{key}");
            assert_eq!(c != 0, shown([a, b, c, d]).matches('x').count() == 2, "{key}");
            assert!(x.is_integer() || matches!(level, 3 | 5), "{key}");
            fractions += usize::from(!x.is_integer());
        }
        assert!((80..200).contains(&fractions), "{fractions}");
    }
}
