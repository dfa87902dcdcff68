//! Many requests at any time: what goes into each call of the model.
//!
//! [`Service`] owns a model on a thread of its own and takes requests from any thread. Each call of the model carries
//! a token for every sequence that is being answered, and beside them chunks of prompts, bounded, so that who is
//! being answered never waits for who is being read. Requests are taken up by priority, then by arrival.
//!
//! Memory is counted in pages. Every full page of a sequence stands in a tree under the tokens that lead to it
//! (`prefix.rs`), where the next request with the same beginning finds it: another answer, the next turn, another
//! conversation with the same instructions. Where memory is short, pages that nobody reads go first; then the least
//! urgent sequence gives up its pages and waits, and reads its text again later.
//!
//! By the bit contract nothing of this shows: a request gives the same tokens, text and log-probabilities alone and
//! under any load, through any wait, with its prompt read, found, or read again.

mod job;
mod prefix;
mod service;
#[cfg(test)]
mod tests;

use std::time::Instant;

use minke_model::{CacheKind, PAGE};

use crate::compiler::Form;
use crate::engine::{Engine, Generation, Request, StopReason};
use crate::sequence::{Sequence, common};
use crate::step::Written;

use job::Job;
use prefix::PrefixTree;

pub use job::{Done, Event, Order, Sink, Times, Usage};
pub use service::{Handle, Service, ServiceError, Stream, SubmitError, Ticket};

/// Fewer tokens than this are read rather than taken from another sequence.
const WORTH_SHARING: usize = 16;

/// How much a service takes on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ServiceOptions {
    /// Sequences that are served at once.
    pub max_running: usize,
    /// Requests that wait for their turn.
    pub max_waiting: usize,
    /// Tokens of one call of the model; bounds the memory of activations.
    pub tokens_per_call: usize,
    /// Of these, tokens of prompts where answers are being written: a longer call is a longer wait for all of them.
    pub prompt_tokens_beside: usize,
    /// Memory of all caches.
    pub cache_bytes: usize,
    /// What caches keep.
    pub cache: CacheKind,
}

impl Default for ServiceOptions {
    fn default() -> Self {
        Self {
            max_running: 32,
            max_waiting: 256,
            tokens_per_call: 512,
            prompt_tokens_beside: 128,
            cache_bytes: 2 << 30,
            cache: CacheKind::Model,
        }
    }
}

/// What a service is doing.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Sequences that are being read or answered.
    pub running: usize,
    /// Requests that wait.
    pub waiting: usize,
    /// Pages of all caches, those that nobody reads included.
    pub pages: usize,
    /// Pages that there may be.
    pub most_pages: usize,
    /// Tokens read or written since the start.
    pub tokens: u64,
    /// Tokens of prompts that were found since the start.
    pub cached: u64,
    /// Times that a sequence gave way.
    pub preempted: u64,
    /// Requests that ended.
    pub ended: u64,
}

/// The requests of a service, and the engine that serves them.
struct Scheduler<'a> {
    engine: Engine<'a>,
    options: ServiceOptions,
    /// Ordered by rank.
    waiting: Vec<(Job, Sequence)>,
    /// One for each of `jobs`.
    sequences: Vec<Sequence>,
    jobs: Vec<Job>,
    tree: PrefixTree,
    /// Memory of a page.
    page_bytes: usize,
    arrivals: u64,
    stats: Stats,
}

impl<'a> Scheduler<'a> {
    /// A scheduler over an engine whose caches are of the kind that `options` say; `most_pages` bounds the context.
    fn new(engine: Engine<'a>, options: ServiceOptions, most_pages: usize) -> Self {
        let page = options.cache.page_bytes(&engine.model.config, &engine.model.precision);
        Self {
            page_bytes: page.unwrap_or(0).max(1),
            engine: engine.with_context(most_pages * PAGE),
            options,
            waiting: Vec::new(),
            sequences: Vec::new(),
            jobs: Vec::new(),
            tree: PrefixTree::default(),
            arrivals: 0,
            stats: Stats { most_pages, ..Stats::default() },
        }
    }

    /// Takes a request in; `form` is its constraint.
    fn submit(&mut self, request: Request, form: Option<Form>, mut job: Job) {
        let guide = match self.engine.guide_with(&request, form) {
            Ok(guide) => guide,
            Err(error) => {
                self.stats.ended += 1;
                return job.tell(Event::Failed(error));
            }
        };
        self.arrivals += 1;
        job.arrival = self.arrivals;
        let sequence = Sequence::new(request, guide, self.engine.empty_session(), self.engine.tokenizer());
        job.tell(Event::Accepted);
        if sequence.stop.is_some() {
            self.end(job, sequence);
        } else {
            self.wait(job, sequence);
        }
    }

    /// One call of the model, unless there is nothing to do; says whether there is more.
    fn step(&mut self) -> bool {
        self.sweep();
        self.admit();
        if !self.sequences.is_empty() {
            let takes = self.plan();
            self.stats.tokens += takes.iter().sum::<usize>() as u64;
            for Written { at, token } in self.engine.step(&mut self.sequences, &takes) {
                let job = &mut self.jobs[at];
                match token {
                    Ok(token) => {
                        job.first_token.get_or_insert_with(Instant::now);
                        if let Some(token) = token {
                            job.tell(Event::Token(token));
                        }
                    }
                    Err(error) => {
                        self.sequences[at].stop = Some(StopReason::Cancelled);
                        job.tell(Event::Failed(error));
                    }
                }
            }
            for at in (0..self.sequences.len()).rev() {
                self.keep_pages(at);
                if self.sequences[at].stop.is_some() {
                    let (job, sequence) = self.remove(at);
                    self.end(job, sequence);
                }
            }
        }
        self.stats.running = self.sequences.len();
        self.stats.waiting = self.waiting.len();
        self.stats.pages = self.pages();
        self.stats.running + self.stats.waiting > 0
    }

    /// Lets go of what was cancelled or is too late.
    fn sweep(&mut self) {
        let now = Instant::now();
        for at in (0..self.sequences.len()).rev() {
            if let Some(stop) = self.jobs[at].over(now) {
                self.sequences[at].stop = Some(stop);
                let (job, sequence) = self.remove(at);
                self.end(job, sequence);
            }
        }
        for at in (0..self.waiting.len()).rev() {
            if let Some(stop) = self.waiting[at].0.over(now) {
                let (job, mut sequence) = self.waiting.remove(at);
                sequence.stop = Some(stop);
                self.end(job, sequence);
            }
        }
    }

    /// Takes up who waits, as long as there is room, in order: nobody overtakes one who needs more of it.
    fn admit(&mut self) {
        while let Some((job, sequence)) = self.waiting.first() {
            let priority = job.priority;
            let room = self.sequences.len() < self.options.max_running && self.has_room_for(sequence);
            if !room {
                let Some(last) = self.by_rank().last().filter(|&at| self.jobs[at].priority < priority) else {
                    return;
                };
                self.preempt(last);
                continue;
            }
            let (mut job, sequence) = self.waiting.remove(0);
            job.turn = None;
            self.sequences.push(sequence);
            self.jobs.push(job);
            let at = self.sequences.len() - 1;
            self.find_pages(at);
            self.jobs[at].begun.get_or_insert_with(Instant::now);
        }
    }

    /// Whether all that is running and this one can be read to their ends, and go on for a page.
    fn has_room_for(&self, sequence: &Sequence) -> bool {
        if self.sequences.is_empty() {
            return true;
        }
        let pages = |tokens: usize| (tokens + PAGE).div_ceil(PAGE);
        let promised: usize =
            self.sequences.iter().map(|s| pages(s.all.len()) - s.session.len() / PAGE).sum();
        let (mut held, mut place) = (0, None);
        for tokens in sequence.all.chunks_exact(PAGE) {
            let Some(next) = self.tree.next(place, tokens) else { break };
            held += usize::from(self.tree.page(next).is_shared());
            place = Some(next);
        }
        let needed = pages(sequence.all.len()) - held;
        self.tree.in_use() + promised + needed <= self.stats.most_pages
    }

    /// How many tokens of each sequence go into the next call, with memory for them at hand.
    fn plan(&mut self) -> Vec<usize> {
        loop {
            let takes = self.shares();
            let pages = |tokens: usize| tokens.div_ceil(PAGE);
            let grows = |(sequence, take): (&Sequence, &usize)| {
                let drafts = self.engine.most_drafts(sequence, *take);
                pages(sequence.session.len() + take + drafts) - pages(sequence.session.len())
                    + self.draft_pages(sequence, drafts + 1)
                    - self.draft_pages(sequence, 0)
            };
            let needed = self.pages() + self.sequences.iter().zip(&takes).map(grows).sum::<usize>();
            let missing = needed.saturating_sub(self.stats.most_pages);
            if self.tree.evict(missing) == missing {
                return takes;
            }
            // who drafts more cheaply is late, but who waits is later
            let drafts = |&at: &usize| self.draft_pages(&self.sequences[at], 0) > 0;
            if let Some(at) = self.by_rank().filter(drafts).last() {
                self.sequences[at].drafting.forgo_models();
                continue;
            }
            // one sequence alone fits, since no context is longer than all pages
            let last = self.by_rank().last().expect("memory is short for somebody");
            self.preempt(last);
        }
    }

    /// How many tokens of each sequence go into the next call, if there is memory for them.
    fn shares(&mut self) -> Vec<usize> {
        let mut takes: Vec<usize> = self.sequences.iter().map(|s| usize::from(s.unread() == 1)).collect();
        let answering: usize = takes.iter().sum();
        let mut room = self.options.tokens_per_call.saturating_sub(answering);
        if answering > 0 {
            // who is read is never stopped by those who are answered, nor the other way round
            room = room.min(self.options.prompt_tokens_beside).max(1);
        }
        let mut reading: Vec<usize> = (0..takes.len()).filter(|&at| takes[at] == 0).collect();
        reading.sort_by_key(|&at| self.jobs[at].rank());
        for (turn, &at) in reading.iter().enumerate() {
            if room == 0 {
                break;
            }
            self.find_pages(at);
            self.take_over(at);
            if reading[..turn].iter().any(|&other| takes[other] > 0 && self.reads_for(other, at)) {
                continue;
            }
            takes[at] = self.sequences[at].unread().min(room);
            room -= takes[at];
        }
        takes
    }

    /// Whether sequence `reader` is about to read what `at` needs next.
    fn reads_for(&self, reader: usize, at: usize) -> bool {
        let (reader, sequence) = (&self.sequences[reader], &self.sequences[at]);
        let fed = sequence.session.len();
        reader.session.len() >= fed && common(&reader.all, &sequence.all) >= fed + WORTH_SHARING
    }

    /// Goes on with pages of the tree, where it knows them.
    fn find_pages(&mut self, at: usize) {
        let (job, sequence) = (&mut self.jobs[at], &mut self.sequences[at]);
        let before = sequence.session.len();
        if before != job.pages * PAGE {
            return;
        }
        // the last token is read for its logits
        while (job.pages + 1) * PAGE < sequence.all.len() {
            let tokens = &sequence.all[job.pages * PAGE..(job.pages + 1) * PAGE];
            let Some(place) = self.tree.next(job.place, tokens) else { break };
            sequence.session.push_page(tokens, self.tree.page(place));
            (job.pages, job.place) = (job.pages + 1, Some(place));
        }
        self.found(at, before);
    }

    /// Goes on from another sequence that begins alike and is further on.
    fn take_over(&mut self, at: usize) {
        let sequence = &self.sequences[at];
        let before = sequence.session.len();
        let most = sequence.all.len() - 1;
        let alike = |(other, donor): (usize, &Sequence)| {
            let shared = donor.session.len().min(most);
            if other == at || shared < before + WORTH_SHARING {
                return None;
            }
            Some((common(&donor.all[..shared], &sequence.all), other))
        };
        let best = self.sequences.iter().enumerate().filter_map(alike).max();
        let Some((shared, donor)) = best.filter(|(shared, _)| *shared >= before + WORTH_SHARING) else {
            return;
        };
        self.sequences[at].session = self.sequences[donor].session.beginning(shared);
        self.keep_pages(at);
        self.found(at, before);
    }

    fn found(&mut self, at: usize, before: usize) {
        let found = self.sequences[at].session.len() - before;
        self.stats.cached += found as u64;
        if self.jobs[at].first_token.is_none() {
            self.jobs[at].found += found;
        }
    }

    /// Puts full pages into the tree; a page that is there already is held once.
    fn keep_pages(&mut self, at: usize) {
        let (job, sequence) = (&mut self.jobs[at], &mut self.sequences[at]);
        while (job.pages + 1) * PAGE <= sequence.session.len() {
            let tokens = &sequence.all[job.pages * PAGE..(job.pages + 1) * PAGE];
            let place = match self.tree.next(job.place, tokens) {
                Some(place) => {
                    sequence.session.replace_page(job.pages, self.tree.page(place));
                    place
                }
                None => self.tree.insert(job.place, tokens, sequence.session.page(job.pages)),
            };
            (job.pages, job.place) = (job.pages + 1, Some(place));
        }
    }

    /// Pages of all caches: full ones are in the tree, the last one of each sequence is its own, and so are those of who
    /// drafts for it, counted as pages of the model.
    fn pages(&self) -> usize {
        let own = |sequence: &Sequence| {
            usize::from(!sequence.session.len().is_multiple_of(PAGE)) + self.draft_pages(sequence, 0)
        };
        self.tree.len() + self.sequences.iter().map(own).sum::<usize>()
    }

    /// What drafts for a sequence take, once it has got `more` tokens.
    fn draft_pages(&self, sequence: &Sequence, more: usize) -> usize {
        self.engine.draft_bytes(sequence, more).div_ceil(self.page_bytes)
    }

    /// All sequences; the last gives way first.
    fn by_rank(&self) -> impl Iterator<Item = usize> {
        let mut all: Vec<usize> = (0..self.jobs.len()).collect();
        all.sort_by_key(|&at| self.jobs[at].rank());
        all.into_iter()
    }

    /// Makes a sequence give up its memory and wait.
    fn preempt(&mut self, at: usize) {
        let (mut job, mut sequence) = self.remove(at);
        sequence.session = self.engine.empty_session();
        sequence.drafting.let_go();
        (job.pages, job.place) = (0, None);
        if job.first_token.is_none() {
            job.found = 0;
        }
        self.stats.preempted += 1;
        self.wait(job, sequence);
    }

    fn wait(&mut self, job: Job, sequence: Sequence) {
        let at = self.waiting.partition_point(|(other, _)| other.rank() < job.rank());
        self.waiting.insert(at, (job, sequence));
    }

    fn remove(&mut self, at: usize) -> (Job, Sequence) {
        if let Some(place) = self.jobs[at].place {
            self.tree.touch(place);
        }
        (self.jobs.swap_remove(at), self.sequences.swap_remove(at))
    }

    /// Tells how a sequence ended.
    fn end(&mut self, mut job: Job, sequence: Sequence) {
        self.stats.ended += 1;
        let prompt = sequence.request.prompt.len();
        let (generation, _, text) = sequence.finish();
        let usage = Usage { prompt, cached: job.found, completion: generation.tokens.len() };
        let (begun, times) = (job.begun.is_some(), job.times());
        let Generation { stop, thought, speculated, .. } = generation;
        job.tell(Event::Done(Done { text, stop, begun, usage, times, thought, speculated }));
    }

    /// Ends all that there is.
    fn stop(&mut self) {
        while let Some((job, sequence)) = self.waiting.pop() {
            self.end(job, sequence);
        }
        while !self.sequences.is_empty() {
            let (job, sequence) = self.remove(0);
            self.end(job, sequence);
        }
    }
}
