//! Stop strings in a stream of text.

/// Lets text through until a stop string is complete, wherever the pieces of the stream begin and end.
///
/// Text that may still become a stop string is held back; so nothing of a stop string is ever let through.
/// Of several the one that is complete first wins, then the longest; so the result does not depend on the pieces.
#[derive(Debug, Clone)]
pub struct StopMatcher {
    stops: Vec<String>,
    held: String,
}

impl StopMatcher {
    /// A matcher for these strings; empty ones never match.
    pub fn new(stops: impl IntoIterator<Item = String>) -> Self {
        Self { stops: stops.into_iter().filter(|stop| !stop.is_empty()).collect(), held: String::new() }
    }

    /// Takes a piece; gives the text that is safe to show, and the stop string if one is complete.
    pub fn push(&mut self, piece: &str) -> (String, Option<String>) {
        self.held.push_str(piece);
        let found = self.stops.iter().filter_map(|stop| {
            let start = self.held.find(stop.as_str())?;
            Some((start + stop.len(), start, stop))
        });
        if let Some((_, start, stop)) = found.min_by_key(|(end, start, _)| (*end, *start)) {
            let stop = stop.clone();
            self.held.truncate(start);
            return (std::mem::take(&mut self.held), Some(stop));
        }
        let keep = self.stops.iter().map(|stop| overlap(&self.held, stop)).max().unwrap_or(0);
        let rest = self.held.split_off(self.held.len() - keep);
        (std::mem::replace(&mut self.held, rest), None)
    }

    /// Ends the stream: what was held back is ordinary text after all.
    pub fn finish(&mut self) -> String {
        std::mem::take(&mut self.held)
    }
}

/// Bytes at the end of `text` that begin `stop` without being all of it.
fn overlap(text: &str, stop: &str) -> usize {
    let longest = text.len().min(stop.len() - 1);
    (1..=longest).rev().find(|&n| stop.is_char_boundary(n) && text.ends_with(&stop[..n])).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn run(stops: &[String], pieces: &[&str]) -> (String, Option<String>) {
        let mut matcher = StopMatcher::new(stops.to_vec());
        let mut shown = String::new();
        for piece in pieces {
            let (text, stop) = matcher.push(piece);
            shown.push_str(&text);
            if stop.is_some() {
                return (shown, stop);
            }
        }
        shown.push_str(&matcher.finish());
        (shown, None)
    }

    #[test]
    fn a_stop_string_may_lie_across_pieces() {
        let stops = ["\n\nUser:".to_owned()];
        assert_eq!(run(&stops, &["hi\n", "\nUs", "er: x"]), ("hi".into(), Some(stops[0].clone())));
        assert_eq!(run(&stops, &["hi\n", "\nUs", "ing"]), ("hi\n\nUsing".into(), None));
        assert_eq!(run(&[String::new()], &["a", "b"]), ("ab".into(), None));
    }

    proptest! {
        #[test]
        fn pieces_do_not_matter(
            text in "[aé]{0,12}",
            stops in proptest::collection::vec("[aé]{1,4}", 0..3),
            cuts in proptest::collection::vec(0_usize..24, 0..6),
        ) {
            let mut at: Vec<usize> = cuts.into_iter().filter(|&cut| text.is_char_boundary(cut)).collect();
            at.extend([0, text.len()]);
            at.sort_unstable();
            let pieces: Vec<&str> = at.windows(2).map(|w| &text[w[0]..w[1]]).collect();
            let got = run(&stops, &pieces);
            prop_assert_eq!(&got, &run(&stops, &[text.as_str()]));
            match got.1 {
                None => {
                    prop_assert_eq!(&got.0, &text);
                    prop_assert!(stops.iter().all(|stop| !text.contains(stop.as_str())));
                }
                Some(stop) => {
                    let through = format!("{}{stop}", got.0);
                    prop_assert!(text.starts_with(&through));
                    // nothing was complete before
                    let before = &through[..through.len() - stop.chars().next_back().map_or(0, char::len_utf8)];
                    prop_assert!(stops.iter().all(|stop| !before.contains(stop.as_str())));
                }
            }
        }
    }
}
