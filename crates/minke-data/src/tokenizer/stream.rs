//! Ids to text as they arrive.

use std::collections::HashMap;

use super::Tokenizer;

/// How many ids a decoder without bytes waits for a character before it takes U+FFFD for an answer.
const MAX_WAIT: usize = 16;

/// Turns a stream of ids into pieces of text, each ending at a complete character.
///
/// The pieces and what [`StreamDecoder::finish`] gives join to what [`Tokenizer::decode`] gives for all ids.
#[derive(Debug)]
pub struct StreamDecoder {
    tokenizer: Tokenizer,
    skip_special: bool,
    /// Bytes of a character that is not complete.
    pending: Vec<u8>,
    /// Whether there are bytes at all.
    begun: bool,
    /// For vocabularies without bytes: ids since the last clean cut, and how much of their text is out.
    ids: Vec<u32>,
    given: usize,
}

impl StreamDecoder {
    pub(super) fn new(tokenizer: Tokenizer, skip_special: bool) -> Self {
        Self { tokenizer, skip_special, pending: Vec::new(), begun: false, ids: Vec::new(), given: 0 }
    }

    /// The same behind a token, whose own text is not given; one that shows none is as if it were not there.
    #[must_use]
    pub fn behind(mut self, id: u32) -> Self {
        if self.tokenizer.has_bytes() {
            let _ = self.tokenizer.shown_bytes(id, self.skip_special, &mut self.begun);
        } else {
            self.ids.push(id);
            self.given = self.tokenizer.decode(&self.ids, self.skip_special).len();
        }
        self
    }

    /// Takes one id and gives the text that is complete with it, perhaps none.
    pub fn step(&mut self, id: u32) -> String {
        if !self.tokenizer.has_bytes() {
            return self.step_text(id);
        }
        let bytes = self.tokenizer.shown_bytes(id, self.skip_special, &mut self.begun);
        self.pending.extend_from_slice(&bytes);
        let mut text = String::new();
        loop {
            match std::str::from_utf8(&self.pending) {
                Ok(rest) => {
                    text.push_str(rest);
                    self.pending.clear();
                    return text;
                }
                Err(error) => {
                    let valid = error.valid_up_to();
                    text.push_str(&String::from_utf8_lossy(&self.pending[..valid]));
                    let Some(invalid) = error.error_len() else {
                        self.pending.drain(..valid);
                        return text;
                    };
                    text.push('\u{fffd}');
                    self.pending.drain(..valid + invalid);
                }
            }
        }
    }

    /// Ends the stream: what is left of an incomplete character becomes U+FFFD.
    pub fn finish(mut self) -> String {
        if self.tokenizer.has_bytes() {
            return String::from_utf8_lossy(&self.pending).into_owned();
        }
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        text.get(std::mem::take(&mut self.given)..).unwrap_or_default().to_owned()
    }

    /// Decoders that strip or join look at neighbours, so the last ids are decoded again with each new one.
    fn step_text(&mut self, id: u32) -> String {
        self.ids.push(id);
        let text = self.tokenizer.decode(&self.ids, self.skip_special);
        let waiting = text.ends_with('\u{fffd}') && self.ids.len() < MAX_WAIT;
        if waiting || text.len() <= self.given || !text.is_char_boundary(self.given) {
            return String::new();
        }
        let new = text[self.given..].to_owned();
        // keep one id as the context of the next
        self.ids.drain(..self.ids.len() - 1);
        self.given = self.tokenizer.decode(&self.ids, self.skip_special).len();
        new
    }
}

/// GPT-2's table of printable characters that stand for bytes, from character to byte.
pub(super) fn byte_table() -> HashMap<char, u8> {
    let printable = |b: u8| matches!(b, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256u32;
    let mut table = HashMap::with_capacity(256);
    for byte in 0..=255u8 {
        let code = if printable(byte) {
            u32::from(byte)
        } else {
            next += 1;
            next - 1
        };
        table.insert(char::from_u32(code).expect("below the surrogates"), byte);
    }
    table
}

/// The same table from byte to character.
pub(super) fn byte_letters() -> [char; 256] {
    let mut letters = ['\0'; 256];
    for (letter, byte) in byte_table() {
        letters[byte as usize] = letter;
    }
    letters
}

/// The same table from the character's number to byte.
pub(super) fn bytes_of_letters() -> [Option<u8>; 512] {
    let mut bytes = [None; 512];
    for (letter, byte) in byte_table() {
        bytes[letter as usize] = Some(byte);
    }
    bytes
}

/// Appends the bytes that a token stands for; one with characters outside the table stands for itself.
pub(super) fn push_token_bytes(token: &str, byte_of: &[Option<u8>; 512], out: &mut Vec<u8>) {
    let begin = out.len();
    for letter in token.chars() {
        let Some(byte) = byte_of.get(letter as usize).copied().flatten() else {
            out.truncate(begin);
            out.extend_from_slice(token.as_bytes());
            return;
        };
        out.push(byte);
    }
}
