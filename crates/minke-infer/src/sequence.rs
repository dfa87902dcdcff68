//! A sequence that is being continued: all that is kept of a request between two calls of the model.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use minke_data::{StreamDecoder, Tokenizer};
use minke_model::{Cache, CacheKind, Model, Page};

use crate::choose::Ask;
use crate::engine::{Generation, Request, StopReason, Trace};
use crate::guide::Guide;
use crate::sampling::Allowed;
use crate::speculate::Drafting;
use crate::stop::StopMatcher;

/// A sequence that can be continued: its tokens and what attention keeps of them.
#[derive(Clone)]
pub struct Session {
    pub(crate) cache: Cache,
    pub(crate) tokens: Vec<u32>,
}

impl Session {
    /// An empty sequence of this model.
    pub fn new(model: &Model) -> Self {
        Self { cache: Cache::new(model), tokens: Vec::new() }
    }

    /// An empty sequence with a cache of a kind; `None` for latents of a model without latent attention.
    pub fn of_kind(model: &Model, kind: CacheKind) -> Option<Self> {
        Some(Self { cache: Cache::of_kind(model, kind)?, tokens: Vec::new() })
    }

    /// Tokens in the cache.
    pub fn len(&self) -> usize {
        self.tokens.len()
    }

    /// Whether nothing was read yet.
    pub fn is_empty(&self) -> bool {
        self.tokens.is_empty()
    }

    /// Bytes of the cache.
    pub fn bytes(&self) -> usize {
        self.cache.bytes()
    }

    /// Another that begins with the first `len` tokens of this one, and shares their pages.
    pub(crate) fn beginning(&self, len: usize) -> Self {
        let mut copy = self.clone();
        copy.cache.truncate(len);
        copy.tokens.truncate(len);
        copy
    }

    /// Forgets all tokens from `len` on.
    pub(crate) fn truncate(&mut self, len: usize) {
        if len < self.tokens.len() {
            self.cache.truncate(len);
            self.tokens.truncate(len);
        }
    }

    /// Page `index`, which is full.
    pub(crate) fn page(&self, index: usize) -> Page {
        self.cache.page(index).expect("a page of tokens that were read")
    }

    /// Goes on with a page that was read for another sequence with the same beginning.
    pub(crate) fn push_page(&mut self, tokens: &[u32], page: &Page) {
        self.cache.push_page(page);
        self.tokens.extend_from_slice(tokens);
    }

    /// Holds another's page instead of its own of the same tokens.
    pub(crate) fn replace_page(&mut self, index: usize, page: &Page) {
        self.cache.replace_page(index, page);
    }

    /// Keeps of the cache what `prompt` begins with, but not all of it: the last token must be read for its logits.
    pub(crate) fn reuse(&mut self, prompt: &[u32]) -> usize {
        let common = common(&self.tokens, prompt).min(prompt.len().saturating_sub(1));
        self.cache.truncate(common);
        self.tokens.truncate(common);
        common
    }
}

/// A request while it is being served.
pub(crate) struct Sequence {
    pub request: Request,
    pub guide: Guide,
    pub drafting: Drafting,
    pub session: Session,
    /// Prompt and answer; those beyond the session's are to be read.
    pub all: Vec<u32>,
    /// Tokens of the prompt that were in the cache already.
    pub reused: usize,
    /// Why it is over, once it is.
    pub stop: Option<StopReason>,
    pub trace: Trace,
    /// The earlier one with the same prompt, which reads it for both.
    pub reader: Option<usize>,
    log_probs: Vec<f32>,
    pub top_log_probs: Vec<Vec<(u32, f32)>>,
    text: String,
    decoder: Option<StreamDecoder>,
    matcher: StopMatcher,
}

impl Sequence {
    /// A request that goes on from what a session holds of its prompt.
    pub fn new(request: Request, guide: Guide, mut session: Session, tokenizer: Option<&Tokenizer>) -> Self {
        let decoder = tokenizer.map(|tokenizer| {
            let decoder = tokenizer.stream_decoder(true);
            // the first word of the answer is not that of a text
            match request.prompt.last() {
                Some(&id) => decoder.behind(id),
                None => decoder,
            }
        });
        Self {
            reused: session.reuse(&request.prompt),
            guide,
            drafting: Drafting::new(request.speculation),
            session,
            all: request.prompt.clone(),
            stop: (request.max_tokens == 0).then_some(StopReason::MaxTokens),
            trace: Trace::default(),
            reader: None,
            log_probs: Vec::new(),
            top_log_probs: Vec::new(),
            text: String::new(),
            decoder,
            matcher: StopMatcher::new(request.stop.iter().cloned()),
            request,
        }
    }

    /// Tokens of the answer.
    pub fn tokens(&self) -> usize {
        self.all.len() - self.request.prompt.len()
    }

    /// Tokens that are to be read before the next one can be chosen.
    pub fn unread(&self) -> usize {
        self.all.len() - self.session.tokens.len()
    }

    /// Asks for the token behind `ahead`, which is taken to come next.
    pub fn ask<'a>(&'a self, allowed: Allowed, ahead: &'a [u32]) -> Ask<'a> {
        self.guide.ask(&self.request, allowed, self.all.len(), ahead)
    }

    /// Takes a token into the answer and gives the text that is sure now.
    pub fn take(&mut self, id: u32, log_prob: Option<f32>, context: usize) -> String {
        if self.request.ends_with(id) {
            self.stop = Some(StopReason::Token(id));
            return String::new();
        }
        self.all.push(id);
        self.guide.push(id);
        self.log_probs.extend(log_prob);
        let piece = self.decoder.as_mut().map(|decoder| decoder.step(id)).unwrap_or_default();
        let (text, found) =
            if self.tokens() <= self.request.min_tokens { (piece, None) } else { self.matcher.push(&piece) };
        self.text.push_str(&text);
        self.stop = if let Some(stop) = found {
            // what follows in the same token is not part of the answer
            self.decoder = None;
            Some(StopReason::String(stop))
        } else if self.guide.is_complete() {
            Some(StopReason::Complete)
        } else if self.tokens() >= self.request.max_tokens {
            Some(StopReason::MaxTokens)
        } else if self.all.len() >= context {
            Some(StopReason::Context)
        } else {
            None
        };
        text
    }

    /// What came of it, its session, and the text that was held back: half a character, or the beginning of a stop
    /// string.
    pub fn finish(mut self) -> (Generation, Session, String) {
        let mut stop = self.stop.take().unwrap_or(StopReason::Cancelled);
        let mut rest = String::new();
        if let Some(decoder) = self.decoder.take() {
            let (text, found) = self.matcher.push(&decoder.finish());
            rest = text;
            match found {
                Some(string) => stop = StopReason::String(string),
                None => rest.push_str(&self.matcher.finish()),
            }
            self.text.push_str(&rest);
        }
        let generation = Generation {
            tokens: self.all.split_off(self.request.prompt.len()),
            log_probs: self.log_probs,
            top_log_probs: self.top_log_probs,
            text: self.text,
            thought: self.guide.thought(),
            has_form: self.guide.may_end(),
            speculated: self.drafting.stats,
            stop,
            reused: self.reused,
            trace: self.trace,
        };
        (generation, self.session, rest)
    }
}

/// Tokens with which both begin.
pub(crate) fn common(a: &[u32], b: &[u32]) -> usize {
    a.iter().zip(b).take_while(|(a, b)| a == b).count()
}

/// Lets the first of all that begin with nothing but the same prompt read it.
pub(crate) fn share_prompts(sequences: &mut [Sequence]) {
    let mut readers: HashMap<&[u32], usize> = HashMap::new();
    for (at, sequence) in sequences.iter_mut().enumerate() {
        if sequence.stop.is_none() && sequence.session.is_empty() {
            match readers.entry(&sequence.request.prompt) {
                Entry::Occupied(reader) => sequence.reader = Some(*reader.get()),
                Entry::Vacant(free) => {
                    free.insert(at);
                }
            }
        }
    }
}

/// Hands prompts that have just been read to their end to all that wait for them, who are then wanted as well: gives the
/// rows of logits of all that are, if there are more of them now.
pub(crate) fn take_prompts(
    sequences: &mut [Sequence],
    wanted: &mut Vec<usize>,
    logits: &[f32],
    w: usize,
) -> Option<Vec<f32>> {
    let row_of = |reader: usize| wanted.iter().position(|&at| at == reader);
    let mut rows: Vec<(usize, usize)> = wanted.iter().copied().zip(0..).collect();
    for at in 0..sequences.len() {
        if let Some((reader, row)) = sequences[at].reader.and_then(|reader| Some((reader, row_of(reader)?))) {
            let (session, routes) =
                (sequences[reader].session.clone(), sequences[reader].trace.routes.clone());
            let sequence = &mut sequences[at];
            (sequence.session, sequence.trace.routes, sequence.reader) = (session, routes, None);
            rows.push((at, row));
        }
    }
    if rows.len() == wanted.len() {
        return None;
    }
    rows.sort_unstable();
    *wanted = rows.iter().map(|&(at, _)| at).collect();
    Some(rows.iter().flat_map(|&(_, row)| &logits[row * w..(row + 1) * w]).copied().collect())
}

/// Notes for each sequence to which experts its rows were sent; `read` has the rows of each that was in the call.
pub(crate) fn trace_routes(sequences: &mut [Sequence], read: &[(usize, usize)], routes: &[Arc<[u32]>]) {
    let rows: usize = read.iter().map(|(_, n)| n).sum();
    for (index, layer) in routes.iter().enumerate() {
        let k = layer.len() / rows.max(1);
        let mut rest = &layer[..];
        for &(at, n) in read {
            let trace = &mut sequences[at].trace;
            trace.routes.resize(routes.len(), Vec::new());
            let (own, others) = rest.split_at(n * k);
            trace.routes[index].extend_from_slice(own);
            rest = others;
        }
    }
}
