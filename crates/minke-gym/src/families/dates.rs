//! Dates of the Gregorian calendar and times of the day.

use num_bigint::BigInt;
use num_rational::BigRational;

use super::calendar::{self, Date};
use crate::{Care, Draw, Family, Work, number};

/// See the module.
///
/// A key is `clock 09:40 95` (95 minutes later), `span 09:40 11:15`, `add 2026-01-30 45`, `diff 2026-01-30 2026-03-16`
/// or `weekday 2026-03-01`.
pub struct Dates;

/// Marks passed at once with little care.
const AT_ONCE: usize = 3;
/// Minutes of an hour and of a day.
const HOUR: i64 = 60;
const DAY: i64 = 24 * HOUR;

const WEEKDAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];
/// What a month adds to the weekday, with January and February counted to the year before.
const MONTH_SHIFT: [i64; 12] = [0, 3, 2, 5, 0, 3, 5, 1, 4, 6, 2, 4];

/// Minutes since midnight of `09:40`, `9:40` or `9:40 pm`.
fn parse_clock(text: &str) -> Option<i64> {
    let text = text.trim().trim_end_matches('.').to_ascii_lowercase();
    let half = [("am", 0), ("pm", 12 * HOUR)]
        .into_iter()
        .find_map(|(end, add)| Some((text.strip_suffix(end)?, add)));
    let (hours, minutes) = half.map_or(text.as_str(), |(rest, _)| rest).trim().split_once(':')?;
    let digits = |word: &str| word.len() <= 2 && word.bytes().all(|b| b.is_ascii_digit());
    if !digits(hours) || !digits(minutes) || minutes.len() != 2 {
        return None;
    }
    let (hours, minutes) = (hours.parse::<i64>().ok()?, minutes.parse::<i64>().ok()?);
    match half {
        _ if minutes >= HOUR => None,
        Some((_, add)) if (1..=12).contains(&hours) => Some(hours % 12 * HOUR + minutes + add),
        None if hours < 24 => Some(hours * HOUR + minutes),
        _ => None,
    }
}

fn show_clock(minutes: i64) -> String {
    format!("{:02}:{:02}", minutes.rem_euclid(DAY) / HOUR, minutes.rem_euclid(HOUR))
}

/// Whether a text is a way to say this many minutes: `95`, `95 min`, `1 h 35 min`, `1 hour and 35 minutes`.
fn is_span(text: &str, minutes: i64) -> bool {
    let text = text.trim().trim_end_matches('.').to_ascii_lowercase();
    if text.len() > 60 {
        return false;
    }
    let mut words: Vec<String> = Vec::new();
    for c in text.chars() {
        // a unit may follow its number without a blank
        let same = words
            .last()
            .and_then(|word| word.chars().last())
            .is_some_and(|last| !c.is_whitespace() && last.is_ascii_alphabetic() == c.is_ascii_alphabetic());
        match words.last_mut() {
            Some(word) if same => word.push(c),
            _ if c.is_whitespace() => words.push(String::new()),
            _ => words.push(c.to_string()),
        }
    }
    let words: Vec<&str> =
        words.iter().map(String::as_str).filter(|word| !matches!(*word, "" | "and")).collect();
    let unit = |word: &str| match word {
        "h" | "hr" | "hrs" | "hour" | "hours" => Some(HOUR),
        "m" | "min" | "mins" | "minute" | "minutes" => Some(1),
        _ => None,
    };
    match words.as_slice() {
        [number] => number::is(number, minutes),
        [number, one] if unit(one) == Some(1) => number::is(number, minutes),
        [number, one] if unit(one) == Some(HOUR) => {
            let minutes = BigRational::from(BigInt::from(minutes));
            number::parse(number).is_some_and(|got| got * BigInt::from(HOUR) == minutes)
        }
        [hours, one, rest, two] if unit(one) == Some(HOUR) && unit(two) == Some(1) => {
            number::is(hours, minutes / HOUR) && number::is(rest, minutes % HOUR)
        }
        _ => false,
    }
}

/// A key, read.
enum Ask {
    Clock(i64, i64),
    Span(i64, i64),
    Add(Date, i64),
    Diff(Date, Date),
    Weekday(Date),
}

impl Ask {
    fn read(key: &str) -> Self {
        let mut words = key.split(' ');
        let mut next = || words.next().expect("a key of this family");
        let clock = |word: &str| parse_clock(word).expect("a key of this family");
        let date = |word: &str| Date::parse(word).expect("a key of this family");
        let count = |word: &str| word.parse().expect("a key of this family");
        match next() {
            "clock" => Self::Clock(clock(next()), count(next())),
            "span" => Self::Span(clock(next()), clock(next())),
            "add" => Self::Add(date(next()), count(next())),
            "diff" => Self::Diff(date(next()), date(next())),
            _ => Self::Weekday(date(next())),
        }
    }

    fn answer(&self) -> String {
        match *self {
            Self::Clock(from, minutes) => show_clock(from + minutes),
            Self::Span(from, to) => (to - from).to_string(),
            Self::Add(from, days) => Date::of_number(from.number() + days).show(),
            Self::Diff(from, to) => (to.number() - from.number()).to_string(),
            Self::Weekday(date) => WEEKDAYS[date.weekday()].to_owned(),
        }
    }

    /// From the start over each full hour or first of a month to the end, and whether the end was asked for.
    fn marks(&self) -> Option<(Vec<i64>, bool)> {
        let (from, to, forward) = match *self {
            Self::Clock(from, minutes) => (from, from + minutes, true),
            Self::Span(from, to) => (from, to, false),
            Self::Add(from, days) => (from.number(), from.number() + days, true),
            Self::Diff(from, to) => (from.number(), to.number(), false),
            Self::Weekday(_) => return None,
        };
        let mut marks = vec![from];
        let mut at = from;
        while at < to {
            let next = match self {
                Self::Clock(..) | Self::Span(..) => (at / HOUR + 1) * HOUR,
                _ => Date::of_number(at).next_month().number(),
            };
            at = next.min(to);
            marks.push(at);
        }
        Some((marks, forward))
    }

    fn show(&self, mark: i64) -> String {
        match self {
            Self::Clock(..) | Self::Span(..) => show_clock(mark),
            _ => Date::of_number(mark).show(),
        }
    }

    fn thought(&self, care: Care) -> String {
        let Some((marks, forward)) = self.marks() else { return self.weekday_thought(care) };
        let (from, to, last) = (marks[0], marks[marks.len() - 1], marks.len() - 1);
        let said = |at: &usize| care == Care::Full || *at == last || (*at > 0 && at.is_multiple_of(AT_ONCE));
        let line = |at: usize| match (forward, marks[at]) {
            (true, mark) if at == last => self.show(mark),
            (true, mark) => format!("{} + {}", self.show(mark), to - mark),
            (false, mark) => format!("{} {}", self.show(mark), mark - from),
        };
        (0..marks.len()).filter(said).map(line).collect::<Vec<_>>().join("\n")
    }

    /// The year with its leap days, the month's shift and the day, modulo 7.
    fn weekday_thought(&self, care: Care) -> String {
        let Self::Weekday(date) = *self else { return String::new() };
        let year = if date.month < 3 { date.year - 1 } else { date.year };
        let (fourth, hundredth, leap) = (year / 4, year / 100, year / 400);
        let sum = year + fourth - hundredth + leap;
        let shift = MONTH_SHIFT[date.month as usize - 1];
        let total = sum + shift + date.day;
        let rest = format!("{total} = 7 * {} + {}", total / 7, total % 7);
        if care == Care::Brief {
            return rest;
        }
        format!(
            "year {year}\n{year} + {fourth} - {hundredth} + {leap} = {sum}\nmonth {shift}\n{sum} + {shift} + {} = {total}\n{rest}\n{} {}",
            date.day,
            total % 7,
            WEEKDAYS[(total % 7) as usize]
        )
    }
}

/// A day of the years from 1950 to 2049, or with `far` from 1800 to 2199.
fn draw_date(far: bool, draw: &mut Draw) -> Date {
    let (first, last) = if far { (1800, 2199) } else { (1950, 2049) };
    let (year, month) = (draw.between(first, last), draw.between(1, 12));
    Date { year, month, day: draw.between(1, calendar::days_of_month(year, month)) }
}

impl Family for Dates {
    fn name(&self) -> &'static str {
        "dates"
    }

    fn about(&self) -> &'static str {
        "reckon with times of the day, dates, days between them and weekdays"
    }

    fn levels(&self) -> u32 {
        6
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        let forward = draw.chance(0.5);
        let most = [59, 300, 30, 120, 400, 400][level as usize - 1];
        match level {
            1 | 2 => {
                let count = draw.between(5, most);
                if forward {
                    return format!("clock {} {count}", show_clock(draw.between(0, DAY - 1)));
                }
                let from = draw.between(0, DAY - 1 - count);
                format!("span {} {}", show_clock(from), show_clock(from + count))
            }
            3..=5 => {
                let (from, count) = (draw_date(false, draw), draw.between(most / 6, most));
                if forward {
                    return format!("add {} {count}", from.show());
                }
                format!("diff {} {}", from.show(), Date::of_number(from.number() + count).show())
            }
            _ => format!("weekday {}", draw_date(true, draw).show()),
        }
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let first = draw.below(2) == 0;
        match Ask::read(key) {
            Ask::Clock(from, count) if first => {
                format!("What time (HH:MM) is {count} minutes after {}?", show_clock(from))
            }
            Ask::Clock(from, count) => format!("{} plus {count} minutes, as HH:MM?", show_clock(from)),
            Ask::Span(from, to) if first => {
                format!("How many minutes from {} to {}?", show_clock(from), show_clock(to))
            }
            Ask::Span(from, to) => format!("Minutes between {} and {}?", show_clock(from), show_clock(to)),
            Ask::Add(from, count) if first => {
                format!("Which date (YYYY-MM-DD) is {count} days after {}?", from.show())
            }
            Ask::Add(from, count) => format!("{} plus {count} days, as YYYY-MM-DD?", from.show()),
            Ask::Diff(from, to) if first => format!("How many days from {} to {}?", from.show(), to.show()),
            Ask::Diff(from, to) => format!("Days between {} and {}?", from.show(), to.show()),
            Ask::Weekday(date) if first => format!("Which day of the week is {}?", date.show()),
            Ask::Weekday(date) => format!("Name the weekday of {}", date.show()),
        }
    }

    fn answer(&self, key: &str) -> String {
        Ask::read(key).answer()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        match Ask::read(key) {
            Ask::Clock(from, count) => parse_clock(answer) == Some((from + count).rem_euclid(DAY)),
            Ask::Span(from, to) => is_span(answer, to - from),
            Ask::Add(from, count) => Date::parse(answer) == Some(Date::of_number(from.number() + count)),
            Ask::Diff(from, to) => {
                let answer = answer.trim().trim_end_matches('.');
                let answer =
                    answer.strip_suffix(" days").or_else(|| answer.strip_suffix(" day")).unwrap_or(answer);
                number::is(answer, to.number() - from.number())
            }
            Ask::Weekday(date) => {
                let (answer, name) = (answer.trim().trim_end_matches('.'), WEEKDAYS[date.weekday()]);
                answer.eq_ignore_ascii_case(name) || answer.eq_ignore_ascii_case(&name[..3])
            }
        }
    }

    /// Goes from full hour to full hour, or from month to month; with little care three of them at once.
    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let ask = Ask::read(key);
        let thought = if care == Care::None { String::new() } else { ask.thought(care) };
        Some(Work { thought, answer: ask.answer() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn forms_of_a_date_pass() {
        let key = "add 2026-01-30 30";
        for answer in
            ["2026-03-01", "March 1, 2026", "1 March 2026", "Mar 1st, 2026", "2026/3/1", "2026年3月1日"]
        {
            assert!(Dates.verify(key, answer), "{answer}");
        }
        for answer in
            ["2026-03-02", "-2026-03-01", "03-01", "26-03-01", "Marching 1 2026", "2026-03-01-01", "1/3/2026"]
        {
            assert!(!Dates.verify(key, answer), "{answer}");
        }
        assert!(!Dates.verify(key, &"2026-".repeat(100_000)));
    }

    #[test]
    fn times_and_spans_pass_in_their_forms() {
        for answer in ["00:10", "0:10", "12:10 am"] {
            assert!(Dates.verify("clock 23:50 20", answer), "{answer}");
        }
        for answer in ["24:10", "0:1", "12:10 pm", "13:10 am", "00:70", ":", "23:70", "0:10:00"] {
            assert!(!Dates.verify("clock 23:50 20", answer), "{answer}");
        }
        for answer in ["90", "90 min", "1 h 30 min", "1h30m", "1 hour and 30 minutes", "1.5 hours"] {
            assert!(Dates.verify("span 09:40 11:10", answer), "{answer}");
        }
        for answer in ["91", "1 h", "30 min", "90 h", "1 h 90 min", "hours", "90 90", "1 min 30 h"] {
            assert!(!Dates.verify("span 09:40 11:10", answer), "{answer}");
        }
        assert!(Dates.verify("diff 2024-02-28 2024-03-01", "2 days"));
        assert!(!Dates.verify("diff 2023-02-28 2023-03-01", "2 days"));
        assert!(Dates.verify("weekday 2026-03-01", "sunday."));
        assert!(!Dates.verify("weekday 2026-03-01", "Sunny"));
    }

    #[test]
    fn thoughts_are_as_written_here() {
        let thought = |key: &str, care| Dates.work(key, care, &mut Draw::new(0, 0)).unwrap().thought;
        assert_eq!(thought("clock 09:40 95", Care::Full), "09:40 + 95\n10:00 + 75\n11:00 + 15\n11:15");
        assert_eq!(thought("span 09:40 11:15", Care::Full), "09:40 0\n10:00 20\n11:00 80\n11:15 95");
        assert_eq!(thought("diff 2026-01-30 2026-03-16", Care::Brief), "2026-03-16 45");
        let full = "year 2026\n2026 + 506 - 20 + 5 = 2517\nmonth 2\n2517 + 2 + 1 = 2520\n2520 = 7 * 360 + 0\n0 Sunday";
        assert_eq!(thought("weekday 2026-03-01", Care::Full), full);
        for index in 0..200 {
            let key = Dates.key(6, &mut Draw::new(1, index));
            assert!(thought(&key, Care::Full).ends_with(&Dates.answer(&key)), "{key}");
        }
    }
}
