//! The Gregorian calendar, by its rules.

const MONTHS: [&str; 12] = [
    "january",
    "february",
    "march",
    "april",
    "may",
    "june",
    "july",
    "august",
    "september",
    "october",
    "november",
    "december",
];

pub fn days_of_month(year: i64, month: i64) -> i64 {
    let leap = year % 4 == 0 && (year % 100 != 0 || year % 400 == 0);
    match month {
        2 if leap => 29,
        2 => 28,
        4 | 6 | 9 | 11 => 30,
        _ => 31,
    }
}

/// A day of the calendar.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Date {
    pub year: i64,
    pub month: i64,
    pub day: i64,
}

impl Date {
    /// A date that there is, in the years 1 to 9999.
    pub fn new(year: i64, month: i64, day: i64) -> Option<Self> {
        let good = (1..=9999).contains(&year) && (1..=12).contains(&month);
        (good && (1..=days_of_month(year, month)).contains(&day)).then_some(Self { year, month, day })
    }

    /// Reads `2026-03-01`, `2026/3/1`, `March 1, 2026`, `1 Mar 2026`, `2026年3月1日`.
    pub fn parse(text: &str) -> Option<Self> {
        let text = text.trim().trim_end_matches('.').to_lowercase();
        let cut = |c: char| c.is_whitespace() || matches!(c, ',' | '-' | '/' | '.' | '年' | '月' | '日');
        if !text.starts_with(char::is_alphanumeric) || text.len() > 40 {
            return None;
        }
        let words: Vec<&str> = text.split(cut).filter(|word| !word.is_empty()).collect();
        let &[first, second, third] = words.as_slice() else { return None };
        let digits = |word: &str, most| {
            let good = (1..=most).contains(&word.len()) && word.bytes().all(|b| b.is_ascii_digit());
            if good { word.parse::<i64>().ok() } else { None }
        };
        let year = |word: &str| if word.len() == 4 { digits(word, 4) } else { None };
        let day = |word: &str| {
            let plain = ["st", "nd", "rd", "th"].iter().find_map(|end| word.strip_suffix(end));
            digits(plain.unwrap_or(word), 2)
        };
        let month = |word: &str| {
            let named = |name: &&str| **name == *word || name[..3] == *word;
            MONTHS.iter().position(named).map(|at| at as i64 + 1)
        };
        if let Some(year) = year(first) {
            return Self::new(year, digits(second, 2)?, digits(third, 2)?);
        }
        match month(first) {
            Some(month) => Self::new(year(third)?, month, day(second)?),
            None => Self::new(year(third)?, month(second)?, day(first)?),
        }
    }

    /// The number of the day, where 0001-01-01 is day 1.
    pub fn number(self) -> i64 {
        let before = self.year - 1;
        let months: i64 = (1..self.month).map(|month| days_of_month(self.year, month)).sum();
        365 * before + before / 4 - before / 100 + before / 400 + months + self.day
    }

    /// The date of a day's number.
    pub fn of_number(number: i64) -> Self {
        // no year is too long for this guess, so the loop only goes up
        let mut date = Self { year: (number - 1) / 366 + 1, month: 1, day: 1 };
        while (Self { year: date.year + 1, ..date }).number() <= number {
            date.year += 1;
        }
        while date.month < 12 && (Self { month: date.month + 1, ..date }).number() <= number {
            date.month += 1;
        }
        date.day += number - date.number();
        date
    }

    /// The first day of the next month.
    pub fn next_month(self) -> Self {
        match self.month {
            12 => Self { year: self.year + 1, month: 1, day: 1 },
            month => Self { month: month + 1, day: 1, ..self },
        }
    }

    /// 0 for a Sunday.
    pub fn weekday(self) -> usize {
        self.number().rem_euclid(7) as usize
    }

    pub fn show(self) -> String {
        format!("{:04}-{:02}-{:02}", self.year, self.month, self.day)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_calendar_is_gregorian() {
        let date = |text: &str| Date::parse(text).unwrap();
        assert_eq!(date("0001-01-01").number(), 1);
        assert_eq!(date("1970-01-01").number(), 719_163);
        for number in
            (1..3_000_000).step_by(97).chain(date("1899-12-31").number()..date("1905-01-01").number())
        {
            assert_eq!(Date::of_number(number).number(), number);
        }
        for (text, day) in [("2000-01-01", 6), ("1969-07-20", 0), ("2026-03-01", 0), ("1900-03-01", 4)] {
            assert_eq!(date(text).weekday(), day, "{text}");
        }
        for text in ["1900-02-29", "2026-02-29", "2026-13-01", "2026-00-10", "2026-04-31", "0000-01-01"] {
            assert_eq!(Date::parse(text), None, "{text}");
        }
        assert!(Date::parse("2000-02-29").is_some());
    }
}
