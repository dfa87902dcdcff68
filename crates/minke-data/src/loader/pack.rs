//! Whole documents in windows: best-fit packing.
//!
//! Ding et al., Fewer Truncations Improve Language Modeling (2024), section 3: a text that begins or ends in its middle
//! teaches guesses about what was cut off; packing by best fit cuts almost none and costs next to nothing. Theirs sorts
//! all documents by length first; here they come as the stream has them, so that windows stay close to its order, and
//! only a bounded number of windows is open at a time.
//!
//! A document of l tokens takes l - 1 positions: its last token has nothing to predict. One that takes more than a
//! window is cut into pieces of a window's length, and what remains of it is packed like a document. A piece that fits
//! nowhere opens a window, for which the fullest one is closed when there are too many.

use std::sync::Arc;

use crate::shards::ShardSet;

/// Windows that are open at a time.
const OPEN: usize = 256;

/// Which pieces share a window: 8 bytes a piece and 8 a window. How long a piece is follows from its document.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// The first token of every piece in the stream, window by window.
    pieces: Arc<[u64]>,
    /// Where the pieces of every window end.
    ends: Arc<[u64]>,
    /// Positions that hold tokens.
    filled: u64,
}

/// A window that may still take pieces.
struct Open {
    room: usize,
    pieces: Vec<u64>,
}

impl Plan {
    /// Packs the documents of a stream into windows of `len` positions.
    pub(super) fn new(shards: &ShardSet, len: usize) -> Self {
        let (mut pieces, mut ends, mut filled) = (Vec::new(), Vec::new(), 0);
        let mut close = |window: Vec<u64>| {
            pieces.extend(window);
            ends.push(pieces.len() as u64);
        };
        let mut open: Vec<Open> = Vec::with_capacity(OPEN);
        for number in 0..shards.documents() {
            let tokens = shards.document(number).tokens;
            let last = tokens.end - 1;
            filled += last - tokens.start;
            for start in (tokens.start..last).step_by(len) {
                let needs = (last - start).min(len as u64) as usize;
                if needs == len {
                    close(vec![start]);
                    continue;
                }
                // the first of the best, which is the oldest
                let best =
                    (0..open.len()).filter(|&at| open[at].room >= needs).min_by_key(|&at| open[at].room);
                let Some(at) = best else {
                    if open.len() == OPEN {
                        let fullest = (0..OPEN).min_by_key(|&at| open[at].room).expect("there are windows");
                        close(open.remove(fullest).pieces);
                    }
                    open.push(Open { room: len - needs, pieces: vec![start] });
                    continue;
                };
                open[at].room -= needs;
                open[at].pieces.push(start);
                if open[at].room == 0 {
                    close(open.remove(at).pieces);
                }
            }
        }
        for window in open {
            close(window.pieces);
        }
        Self { pieces: pieces.into(), ends: ends.into(), filled }
    }

    /// How many windows there are.
    pub(super) fn windows(&self) -> u64 {
        self.ends.len() as u64
    }

    /// Positions of all windows that hold tokens.
    pub(super) fn filled(&self) -> u64 {
        self.filled
    }

    /// The first tokens of a window's pieces.
    pub(super) fn pieces(&self, window: u64) -> &[u64] {
        let at = window as usize;
        let begin = if at == 0 { 0 } else { self.ends[at - 1] };
        &self.pieces[begin as usize..self.ends[at] as usize]
    }
}
