//! Prices, change and rates, told as small stories in English and Chinese.

use super::division;
use super::shared::{is_whole, read};
use crate::{Care, Draw, Family, Work};

/// See the module.
pub struct Shop;

/// What a story comes to: its structure and numbers.
enum Story {
    /// `each N T`: N things cost T; one?
    Each(i64, i64),
    /// `scale N T M [paid P]`: N things cost T; M things, or the change from P?
    Scale(i64, i64, i64, Option<i64>),
    /// `rate N T M`: T pages in N minutes; in M minutes?
    Rate(i64, i64, i64),
    /// `buy N*P ... [off C] [paid P]`: N things at P each, and so on, less C; the total, or the change?
    Buy { kinds: Vec<(i64, i64)>, off: Option<i64>, paid: Option<i64> },
}

/// Things to buy: in English, and in Chinese with their counter.
const THINGS: [(&str, &str, &str); 6] = [
    ("pens", "笔", "支"),
    ("cups", "杯子", "个"),
    ("books", "书", "本"),
    ("apples", "苹果", "个"),
    ("hats", "帽子", "顶"),
    ("maps", "地图", "张"),
];
const NAMES: [(&str, &str); 4] = [("Ann", "小安"), ("Ben", "小明"), ("Eve", "小红"), ("Max", "小马")];
/// What may stand before or after an amount of money.
const BEFORE_MONEY: [&str; 4] = ["US$", "$", "¥", "￥"];
const AFTER_MONEY: [&str; 9] = ["dollars", "dollar", "USD", "yuan", "RMB", "块钱", "元", "块", "$"];
/// What may stand after a number of pages.
const AFTER_PAGES: [&str; 3] = ["pages", "page", "页"];

impl Story {
    fn read(key: &str) -> Self {
        let words: Vec<&str> = key.split(' ').collect();
        let number = |index: usize| read(words[index]);
        let after = |word| words.iter().position(|&other| other == word).map(|at| number(at + 1));
        match words[0] {
            "each" => Self::Each(number(1), number(2)),
            "scale" => Self::Scale(number(1), number(2), number(3), after("paid")),
            "rate" => Self::Rate(number(1), number(2), number(3)),
            _ => {
                let kinds = words.iter().filter_map(|word| word.split_once('*'));
                let kinds = kinds.map(|(n, price)| (read(n), read(price))).collect();
                Self::Buy { kinds, off: after("off"), paid: after("paid") }
            }
        }
    }

    fn result(&self) -> i64 {
        match self {
            Self::Each(n, total) => total / n,
            Self::Scale(n, total, m, paid) => {
                let cost = total / n * m;
                paid.map_or(cost, |paid| paid - cost)
            }
            Self::Rate(n, total, m) => total / n * m,
            Self::Buy { kinds, off, paid } => {
                let cost = kinds.iter().map(|(n, price)| n * price).sum::<i64>() - off.unwrap_or(0);
                paid.map_or(cost, |paid| paid - cost)
            }
        }
    }

    fn in_english(&self, draw: &mut Draw) -> String {
        let (name, _) = *draw.pick(&NAMES);
        let first = draw.below(THINGS.len() as u64) as usize;
        let thing = |index: usize| THINGS[(first + index) % THINGS.len()].0;
        match self {
            Self::Each(n, total) => match draw.below(2) {
                0 => format!("{n} {} cost ${total}. How much is one?", thing(0)),
                _ => format!("{name} pays ${total} for {n} {}. Price of one?", thing(0)),
            },
            Self::Scale(n, total, m, None) => {
                format!("{n} {} cost ${total}. How much do {m} cost?", thing(0))
            }
            Self::Scale(n, total, m, Some(paid)) => {
                format!("{n} {} cost ${total}. {name} buys {m} and pays ${paid}. How much change?", thing(0))
            }
            Self::Rate(n, total, m) => match draw.below(2) {
                0 => format!("A printer prints {total} pages in {n} minutes. How many in {m} minutes?"),
                _ => format!("{name} reads {total} pages in {n} hours. How many in {m} hours?"),
            },
            Self::Buy { kinds, off, paid } => {
                let kinds: Vec<String> = kinds
                    .iter()
                    .enumerate()
                    .map(|(index, (n, price))| format!("{n} {} at ${price} each", thing(index)))
                    .collect();
                let off = off.map_or(String::new(), |off| format!(" A coupon takes ${off} off."));
                let ask = match paid {
                    Some(paid) => format!(" {name} pays ${paid}. How much change?"),
                    None => " How much in all?".to_owned(),
                };
                format!("{name} buys {}.{off}{ask}", kinds.join(", "))
            }
        }
    }

    fn in_chinese(&self, draw: &mut Draw) -> String {
        let (_, name) = *draw.pick(&NAMES);
        let first = draw.below(THINGS.len() as u64) as usize;
        let (_, thing, counter) = THINGS[first];
        match self {
            Self::Each(n, total) => match draw.below(2) {
                0 => format!("{n}{counter}{thing}共{total}元，每{counter}多少元？"),
                _ => format!("{name}买{n}{counter}{thing}花了{total}元，一{counter}多少元？"),
            },
            Self::Scale(n, total, m, None) => {
                format!("{n}{counter}{thing}{total}元，{m}{counter}多少元？")
            }
            Self::Scale(n, total, m, Some(paid)) => {
                format!("{n}{counter}{thing}{total}元。{name}买{m}{counter}，付{paid}元，找回多少元？")
            }
            Self::Rate(n, total, m) => match draw.below(2) {
                0 => format!("打印机{n}分钟打{total}页，{m}分钟打多少页？"),
                _ => format!("{name}{n}小时读{total}页，{m}小时读多少页？"),
            },
            Self::Buy { kinds, off, paid } => {
                let kinds: Vec<String> = kinds
                    .iter()
                    .enumerate()
                    .map(|(index, (n, price))| {
                        let (_, thing, counter) = THINGS[(first + index) % THINGS.len()];
                        format!("{n}{counter}{thing}，每{counter}{price}元")
                    })
                    .collect();
                let off = off.map_or(String::new(), |off| format!("用券减{off}元。"));
                let ask = match paid {
                    Some(paid) => format!("付{paid}元，找回多少元？"),
                    None => "一共多少元？".to_owned(),
                };
                format!("{name}买{}。{off}{ask}", kinds.join("；"))
            }
        }
    }

    /// The steps one by one; a product with a number of two digits goes by tens and ones.
    fn lines(&self) -> String {
        match self {
            Self::Each(n, total) => one_of(*n, *total),
            Self::Scale(n, total, m, paid) => {
                let cost = total / n * m;
                format!("{}{}{}", one_of(*n, *total), product(*m, total / n), change(cost, *paid))
            }
            Self::Rate(n, total, m) => format!("{}{}", one_of(*n, *total), product(*m, total / n)),
            Self::Buy { kinds, off, paid } => {
                let (mut lines, mut cost) = (String::new(), 0);
                for (n, price) in kinds {
                    lines += &product(*n, *price);
                    if cost > 0 {
                        lines += &format!("{cost}+{}={}\n", n * price, cost + n * price);
                    }
                    cost += n * price;
                }
                if let Some(off) = off {
                    lines += &format!("{cost}-{off}={}\n", cost - off);
                    cost -= off;
                }
                lines + &change(cost, *paid)
            }
        }
    }

    /// All of a sum in one line.
    fn brief(&self) -> String {
        let result = self.result();
        match self {
            Self::Each(n, total) => format!("{total}/{n}={result}"),
            Self::Scale(n, total, m, paid) => {
                let cost = total / n * m;
                format!("{total}/{n}*{m}={cost}\n{}", change(cost, *paid))
            }
            Self::Rate(n, total, m) => format!("{total}/{n}*{m}={result}"),
            Self::Buy { kinds, off, paid } => {
                let cost = kinds.iter().map(|(n, price)| n * price).sum::<i64>() - off.unwrap_or(0);
                let sum: Vec<String> = kinds.iter().map(|(n, price)| format!("{n}*{price}")).collect();
                let off = off.map_or(String::new(), |off| format!("-{off}"));
                format!("{}{off}={cost}\n{}", sum.join("+"), change(cost, *paid))
            }
        }
    }
}

fn one_of(n: i64, total: i64) -> String {
    format!("{total}/{n}\n{}={}\n", division::lines(total, n), total / n)
}

fn product(n: i64, price: i64) -> String {
    let (tens, ones) = (price / 10 * 10, price % 10);
    let mut lines = String::new();
    if tens > 0 {
        lines += &format!("{n}*{tens}={}\n", n * tens);
    }
    if ones > 0 {
        lines += &format!("{n}*{ones}={}\n", n * ones);
    }
    if tens > 0 && ones > 0 {
        lines += &format!("{}+{}={}\n", n * tens, n * ones, n * price);
    }
    lines
}

fn change(cost: i64, paid: Option<i64>) -> String {
    paid.map_or(String::new(), |paid| format!("{paid}-{cost}={}\n", paid - cost))
}

/// A round sum that pays for `cost`, with some change.
fn payment(cost: i64, draw: &mut Draw) -> i64 {
    (cost / 10 + draw.between(1, 4)) * 10
}

fn scaled(draw: &mut Draw) -> (i64, i64, i64) {
    let (n, price, shift) = (draw.between(2, 9), draw.between(2, 20), draw.between(1, 7));
    // another number of things than n: round a circle of 2..=9
    (n, n * price, (n - 2 + shift) % 8 + 2)
}

impl Family for Shop {
    fn name(&self) -> &'static str {
        "shop"
    }

    fn about(&self) -> &'static str {
        "prices, change and rates in small stories, English and Chinese; the level is the number of steps"
    }

    fn levels(&self) -> u32 {
        6
    }

    fn key(&self, level: u32, draw: &mut Draw) -> String {
        // kinds of things bought, whether a coupon counts, whether change is asked for
        let (kinds, off, paid) = match (level, draw.below(3)) {
            (1, 0 | 1) => {
                let (n, price) = (draw.between(2, 9), draw.between(2, 20));
                return format!("each {n} {}", n * price);
            }
            (1, _) => (1, false, false),
            (2, 0) => {
                let (n, total, m) = scaled(draw);
                return format!("scale {n} {total} {m}");
            }
            (2, 1) => {
                let (n, total, m) = scaled(draw);
                return format!("rate {n} {total} {m}");
            }
            (2, _) => (1, false, true),
            (3, 0) => {
                let (n, total, m) = scaled(draw);
                return format!("scale {n} {total} {m} paid {}", payment(total / n * m, draw));
            }
            (3, 1) => (1, true, true),
            (3, _) => (2, false, false),
            (4, 0) => (2, true, false),
            (4, _) => (2, false, true),
            (5, 0) => (3, false, false),
            (5, _) => (2, true, true),
            (_, 0) => (3, true, false),
            (..) => (3, false, true),
        };
        let mut kinds: Vec<(i64, i64)> =
            (0..kinds).map(|_| (draw.between(2, 9), draw.between(2, 20))).collect();
        kinds.sort_unstable();
        let mut cost: i64 = kinds.iter().map(|(n, price)| n * price).sum();
        let mut key = "buy".to_owned();
        for (n, price) in kinds {
            key += &format!(" {n}*{price}");
        }
        if off {
            let off = draw.between(1, cost.min(10) - 1);
            cost -= off;
            key += &format!(" off {off}");
        }
        if paid {
            key += &format!(" paid {}", payment(cost, draw));
        }
        key
    }

    fn prompt(&self, key: &str, draw: &mut Draw) -> String {
        let story = Story::read(key);
        if draw.chance(0.3) { story.in_chinese(draw) } else { story.in_english(draw) }
    }

    fn answer(&self, key: &str) -> String {
        Story::read(key).result().to_string()
    }

    fn verify(&self, key: &str, answer: &str) -> bool {
        let story = Story::read(key);
        let pages = matches!(story, Story::Rate(..));
        let (before, after): (&[&str], &[&str]) =
            if pages { (&[], &AFTER_PAGES) } else { (&BEFORE_MONEY, &AFTER_MONEY) };
        let text = answer.trim().trim_end_matches(['.', '。']);
        // one unit, on one side
        let number = before
            .iter()
            .find_map(|unit| text.strip_prefix(unit))
            .or_else(|| after.iter().find_map(|unit| text.strip_suffix(unit)))
            .unwrap_or(text);
        is_whole(number, story.result())
    }

    fn work(&self, key: &str, care: Care, _draw: &mut Draw) -> Option<Work> {
        let story = Story::read(key);
        let thought = match care {
            Care::Full => story.lines(),
            Care::Brief => story.brief(),
            Care::None => String::new(),
        };
        Some(Work { thought: thought.trim_end().to_owned(), answer: self.answer(key) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn thought(key: &str, care: Care) -> String {
        Shop.work(key, care, &mut Draw::new(0, 0)).unwrap().thought
    }

    #[test]
    fn worked_by_hand() {
        for (key, answer) in [
            ("each 5 70", "14"),
            ("scale 3 12 7", "28"),
            ("scale 3 12 7 paid 50", "22"),
            ("rate 4 60 6", "90"),
            ("buy 3*14", "42"),
            ("buy 2*5 3*14 off 2 paid 60", "10"),
            ("buy 2*5 3*4 4*10", "62"),
        ] {
            assert_eq!(Shop.answer(key), answer, "{key}");
        }
        let full = "2*5=10\n3*10=30\n3*4=12\n30+12=42\n10+42=52\n52-2=50\n60-50=10";
        assert_eq!(thought("buy 2*5 3*14 off 2 paid 60", Care::Full), full);
        assert_eq!(thought("buy 2*5 3*14 off 2 paid 60", Care::Brief), "2*5+3*14-2=50\n60-50=10");
        assert_eq!(thought("each 5 70", Care::Full), "70/5\n7: 5*1=5 r2\n20: 5*4=20 r0\n=14");
        assert_eq!(thought("scale 3 12 7", Care::Brief), "12/3*7=28");
    }

    #[test]
    fn units_are_understood_and_others_are_not() {
        for good in ["14", "$14", "14 元", "14元", "14.00", "¥14", "14 dollars.", "14块", "$14.00."] {
            assert!(Shop.verify("each 5 70", good), "{good:?}");
        }
        for bad in
            ["14 pages", "70/5", "$70/5", "14 cents", "about 14", "14%", "14 元元", "元", "$", "$$14", "-14"]
        {
            assert!(!Shop.verify("each 5 70", bad), "{bad:?}");
        }
        for good in ["90", "90 pages", "90页"] {
            assert!(Shop.verify("rate 4 60 6", good), "{good:?}");
        }
        assert!(!Shop.verify("rate 4 60 6", "$90") && !Shop.verify("rate 4 60 6", "90 元"));
        assert!(!Shop.verify("each 5 70", &"$".repeat(1 << 20)));
    }

    #[test]
    fn stories_tell_every_number_of_their_key() {
        for index in 0..300 {
            let draw = &mut Draw::new(2, index);
            let key = Shop.key(1 + (index % 6) as u32, draw);
            let numbers = |text: &str| -> Vec<i64> {
                let mut all: Vec<i64> =
                    text.split(|c: char| !c.is_ascii_digit()).filter_map(|word| word.parse().ok()).collect();
                all.sort_unstable();
                all
            };
            let story = Story::read(&key);
            assert!(story.result() > 0, "{key}");
            assert_eq!(numbers(&story.in_english(draw)), numbers(&key), "{key}");
            assert_eq!(numbers(&story.in_chinese(draw)), numbers(&key), "{key}");
        }
    }
}
