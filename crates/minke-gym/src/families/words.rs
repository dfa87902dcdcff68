//! Words and letters that string tasks share.

use crate::Draw;

/// Common words, none of which is `and` or `a` (answers may have those between items).
pub const WORDS: [&str; 144] = [
    "act",
    "age",
    "air",
    "arm",
    "bag",
    "bed",
    "bee",
    "bus",
    "cat",
    "cow",
    "cup",
    "dog",
    "ear",
    "egg",
    "eye",
    "fox",
    "hat",
    "ice",
    "ink",
    "jam",
    "key",
    "leg",
    "map",
    "net",
    "oak",
    "owl",
    "pen",
    "rat",
    "sea",
    "sun",
    "tea",
    "van",
    "war",
    "yak",
    "zoo",
    "army",
    "baby",
    "ball",
    "bell",
    "bird",
    "boat",
    "book",
    "cake",
    "desk",
    "door",
    "duck",
    "echo",
    "fish",
    "frog",
    "game",
    "gold",
    "hill",
    "iron",
    "jazz",
    "king",
    "lake",
    "leaf",
    "lion",
    "moon",
    "nest",
    "noon",
    "oven",
    "park",
    "rain",
    "ring",
    "road",
    "ship",
    "snow",
    "tree",
    "unit",
    "wolf",
    "yard",
    "apple",
    "beach",
    "bread",
    "chair",
    "cloud",
    "dream",
    "eagle",
    "fruit",
    "grass",
    "horse",
    "house",
    "igloo",
    "juice",
    "knife",
    "lemon",
    "money",
    "night",
    "ocean",
    "paper",
    "queen",
    "river",
    "sheep",
    "sugar",
    "table",
    "uncle",
    "voice",
    "water",
    "zebra",
    "banana",
    "basket",
    "cheese",
    "coffee",
    "dinner",
    "engine",
    "flower",
    "garden",
    "hammer",
    "island",
    "jacket",
    "kitten",
    "letter",
    "mirror",
    "needle",
    "orange",
    "pepper",
    "rabbit",
    "school",
    "ticket",
    "violin",
    "window",
    "yellow",
    "balloon",
    "cabbage",
    "drummer",
    "freedom",
    "giraffe",
    "kitchen",
    "lettuce",
    "missing",
    "passage",
    "rainbow",
    "success",
    "umbrella",
    "elephant",
    "football",
    "mountain",
    "sandwich",
    "adventure",
    "beginning",
    "crocodile",
    "pineapple",
    "strawberry",
];

/// A word of some letters with probability `real`, less where the list has few, else letters of an alphabet of `kinds`.
pub fn letters(len: usize, kinds: usize, real: f64, draw: &mut Draw) -> String {
    let words: Vec<&str> = WORDS.into_iter().filter(|word| word.len() == len).collect();
    // else a level would ask for the same few words again and again
    let real = real * (words.len() as f64 / 20.0).min(1.0);
    if draw.chance(real) {
        return (*draw.pick(&words)).to_owned();
    }
    let mut alphabet: Vec<u8> = (b'a'..=b'z').collect();
    draw.shuffle(&mut alphabet);
    alphabet.truncate(kinds.clamp(1, 26));
    (0..len).map(|_| char::from(*draw.pick(&alphabet))).collect()
}

/// The letters of an answer, in lower case, without the blanks, hyphens, commas, quotes and full stop that may stand
/// between and around them; `None` when there is anything else.
pub fn joined(answer: &str) -> Option<String> {
    let mut letters = String::new();
    for c in answer.chars() {
        match c {
            'a'..='z' | 'A'..='Z' => letters.push(c.to_ascii_lowercase()),
            '-' | ',' | '.' | '"' | '\'' | '`' => {}
            c if c.is_whitespace() => {}
            _ => return None,
        }
    }
    Some(letters)
}

/// Draws that are a function of a key: for what is shown but does not make another problem.
pub fn draw_of(key: &str) -> Draw {
    let hash = blake3::hash(key.as_bytes());
    let bytes: [u8; 8] = hash.as_bytes()[..8].try_into().expect("a hash has 32 bytes");
    Draw::new(u64::from_le_bytes(bytes), 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_plain_and_differ() {
        let mut words = WORDS.to_vec();
        words.sort_unstable();
        words.dedup();
        assert_eq!(words.len(), WORDS.len());
        assert!(words.iter().all(|word| word.len() > 2 && word.bytes().all(|b| b.is_ascii_lowercase())));
        assert!(!words.contains(&"and"));
    }

    #[test]
    fn letters_are_joined_and_nothing_else_is() {
        for text in ["abc", "A-B-C", "a b c", "\"abc\".", "a, b, c"] {
            assert_eq!(joined(text).as_deref(), Some("abc"), "{text}");
        }
        for text in ["abc1", "a/b", "аbc", "(abc)"] {
            assert_eq!(joined(text), None, "{text}");
        }
    }
}
