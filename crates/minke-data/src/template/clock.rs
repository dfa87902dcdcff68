//! The clock of templates, which stands still.

use minijinja::{Error, ErrorKind};

/// 26 July 2024, the day that Llama's templates fall back to.
const NOW_S: u64 = 1_721_952_000;

/// A day by the codes that templates use, and always the same: what a model is trained on and asked must not depend
/// on the clock.
#[expect(clippy::needless_pass_by_value, reason = "the engine hands arguments over")]
pub(super) fn strftime_now(format: String) -> Result<String, Error> {
    strftime(&format, NOW_S).map_err(|why| Error::new(ErrorKind::InvalidOperation, why))
}

pub(super) fn strftime(format: &str, now_s: u64) -> Result<String, String> {
    const DAYS: [&str; 7] = ["Thursday", "Friday", "Saturday", "Sunday", "Monday", "Tuesday", "Wednesday"];
    const MONTHS: [&str; 12] = [
        "January",
        "February",
        "March",
        "April",
        "May",
        "June",
        "July",
        "August",
        "September",
        "October",
        "November",
        "December",
    ];
    let (days, second) = (now_s / 86_400, now_s % 86_400);
    let (year, month, day) = civil(days);
    let (weekday, month_name) = (DAYS[(days % 7) as usize], MONTHS[month as usize - 1]);
    let mut out = String::new();
    let mut letters = format.chars();
    while let Some(letter) = letters.next() {
        if letter != '%' {
            out.push(letter);
            continue;
        }
        let code = letters.next();
        let (code, bare) = if code == Some('-') { (letters.next(), true) } else { (code, false) };
        let two = |number: u64| if bare { number.to_string() } else { format!("{number:02}") };
        out.push_str(&match code {
            Some('Y') => year.to_string(),
            Some('y') => two(year % 100),
            Some('m') => two(month),
            Some('d') => two(day),
            Some('H') => two(second / 3600),
            Some('M') => two(second / 60 % 60),
            Some('S') => two(second % 60),
            Some('B') => month_name.to_owned(),
            Some('b') => month_name[..3].to_owned(),
            Some('A') => weekday.to_owned(),
            Some('a') => weekday[..3].to_owned(),
            Some('%') => "%".to_owned(),
            other => return Err(format!("strftime_now knows no code {other:?}")),
        });
    }
    Ok(out)
}

/// Year, month and day of a number of days since 1 January 1970, in years of 400 that begin in March.
fn civil(days: u64) -> (u64, u64, u64) {
    let shifted = days + 719_468;
    let (era, of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let from_march = (5 * of_year + 2) / 153;
    let day = of_year - (153 * from_march + 2) / 5 + 1;
    let month = if from_march < 10 { from_march + 3 } else { from_march - 9 };
    (era * 400 + year_of_era + u64::from(month <= 2), month, day)
}
