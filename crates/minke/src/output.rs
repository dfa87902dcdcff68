//! Figures and text as a person reads them.

use std::borrow::Cow;
use std::io::{self, Write};

use serde::Serialize;

use crate::failure::Failure;

/// Prints one JSON object to standard output.
pub fn json(value: &impl Serialize) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    let text = serde_json::to_string_pretty(value).map_err(|error| Failure::other(error.to_string()))?;
    out.write_all(text.as_bytes())?;
    out.write_all(b"\n")?;
    Ok(out.flush()?)
}

/// Prints text to standard output at once.
pub fn text(text: &str) -> Result<(), Failure> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    Ok(out.flush()?)
}

/// Prints a line to standard error, where a person looks and a pipe does not.
pub fn note(line: &str) {
    // where standard error is closed there is no one to tell
    let _ = writeln!(io::stderr().lock(), "{line}");
}

/// Text from a model, made safe for a terminal: control characters could otherwise move its cursor or worse.
pub fn printable(text: &str) -> Cow<'_, str> {
    let harmful = |c: char| c.is_control() && !matches!(c, '\n' | '\t');
    if text.contains(harmful) {
        Cow::Owned(text.chars().map(|c| if harmful(c) { '\u{fffd}' } else { c }).collect())
    } else {
        Cow::Borrowed(text)
    }
}

/// Whether a terminal gets bold and dim text: unless `NO_COLOR` is set, or it says that it is dumb.
pub fn is_styled() -> bool {
    let said = |name| std::env::var_os(name).filter(|value| !value.is_empty());
    said("NO_COLOR").is_none() && said("TERM").is_none_or(|term| term != "dumb")
}

/// A text for a terminal, dim.
pub fn dim(text: &str) -> Cow<'_, str> {
    if is_styled() { format!("\x1b[2m{text}\x1b[22m").into() } else { text.into() }
}

/// A text for a terminal, bold.
pub fn bold(text: &str) -> Cow<'_, str> {
    if is_styled() { format!("\x1b[1m{text}\x1b[22m").into() } else { text.into() }
}

/// Rows of a name and a value, aligned.
pub fn table(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// A count with a decimal suffix: 7.43 M.
pub fn count(n: f64) -> String {
    let steps = [(1e15, " P"), (1e12, " T"), (1e9, " G"), (1e6, " M"), (1e3, " k")];
    scaled(n, &steps)
}

/// Bytes with a binary suffix: 28.3 MiB.
pub fn bytes(n: f64) -> String {
    let step = |power| 1024f64.powi(power);
    let steps = [(step(4), " TiB"), (step(3), " GiB"), (step(2), " MiB"), (step(1), " KiB")];
    let text = scaled(n, &steps);
    if text.ends_with('B') { text } else { format!("{text} B") }
}

fn scaled(n: f64, steps: &[(f64, &str)]) -> String {
    for (size, suffix) in steps {
        if n >= *size {
            let x = n / size;
            let digits = if x < 10.0 { 2 } else { usize::from(x < 100.0) };
            return format!("{x:.digits$}{suffix}");
        }
    }
    if n.fract() == 0.0 { format!("{n:.0}") } else { format!("{n:.2}") }
}

/// A share in percent.
pub fn percent(share: f64) -> String {
    format!("{:.1} %", share * 100.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_have_three_digits() {
        let counts: Vec<String> = [0.0, 12.0, 999.0, 1000.0, 7_431_000.0, 671e9].map(count).into();
        assert_eq!(counts, ["0", "12", "999", "1.00 k", "7.43 M", "671 G"]);
        let sizes: Vec<String> = [0.0, 512.0, 2048.0, 29_674_000.0, 3.0 * 1024f64.powi(3)].map(bytes).into();
        assert_eq!(sizes, ["0 B", "512 B", "2.00 KiB", "28.3 MiB", "3.00 GiB"]);
        assert_eq!(percent(0.4567), "45.7 %");
    }

    #[test]
    fn a_model_cannot_drive_the_terminal() {
        assert_eq!(printable("a\tb\nc"), "a\tb\nc");
        assert_eq!(printable("\u{1b}[2Jx\r\u{9b}"), "\u{fffd}[2Jx\u{fffd}\u{fffd}");
    }
}
