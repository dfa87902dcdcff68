//! Pages that were read once, kept by the tokens that lead to them.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

use minke_model::Page;

/// A place in the tree: a text of whole pages.
pub(super) type Place = usize;

struct Node {
    page: Page,
    tokens: Arc<[u32]>,
    parent: Option<Place>,
    children: HashMap<Arc<[u32]>, Place>,
    /// When it was last asked for; that of a parent is never before that of a child.
    used: u64,
}

/// A tree of pages: a child goes on from its parent with the tokens of one more page.
///
/// Every full page of a sequence that is being served is in it, so its size is what full pages take in all. A page
/// that a cache holds stays; the others go by least recent use, those at the ends of texts first.
#[derive(Default)]
pub(super) struct PrefixTree {
    roots: HashMap<Arc<[u32]>, Place>,
    nodes: Vec<Option<Node>>,
    free: Vec<Place>,
    clock: u64,
}

impl PrefixTree {
    /// Pages held.
    pub fn len(&self) -> usize {
        self.nodes.len() - self.free.len()
    }

    /// Pages that caches hold too.
    pub fn in_use(&self) -> usize {
        self.nodes.iter().flatten().filter(|node| node.page.is_shared()).count()
    }

    /// The page that goes on from `at` with these tokens.
    pub fn next(&self, at: Option<Place>, tokens: &[u32]) -> Option<Place> {
        let children = match at {
            None => &self.roots,
            Some(at) => &self.node(at).children,
        };
        children.get(tokens).copied()
    }

    /// The page of a place.
    pub fn page(&self, at: Place) -> &Page {
        &self.node(at).page
    }

    /// Notes that a place was asked for, now.
    pub fn touch(&mut self, at: Place) {
        self.clock += 1;
        let mut next = Some(at);
        while let Some(at) = next {
            let clock = self.clock;
            let node = self.node_mut(at);
            node.used = clock;
            next = node.parent;
        }
    }

    /// Adds a page behind `parent`.
    pub fn insert(&mut self, parent: Option<Place>, tokens: &[u32], page: Page) -> Place {
        let tokens: Arc<[u32]> = tokens.into();
        let at = self.free.pop().unwrap_or_else(|| {
            self.nodes.push(None);
            self.nodes.len() - 1
        });
        let children = match parent {
            None => &mut self.roots,
            Some(parent) => &mut self.node_mut(parent).children,
        };
        children.insert(tokens.clone(), at);
        self.nodes[at] = Some(Node { page, tokens, parent, children: HashMap::new(), used: 0 });
        self.touch(at);
        at
    }

    /// Gives up `count` pages, or as many as nobody else holds; says how many.
    pub fn evict(&mut self, count: usize) -> usize {
        if count == 0 {
            return 0;
        }
        let ends = self.nodes.iter().enumerate().filter_map(|(at, node)| {
            let node = node.as_ref()?;
            is_idle(node).then_some(Reverse((node.used, at)))
        });
        let mut ends: BinaryHeap<_> = ends.collect();
        for gone in 0..count {
            let Some(Reverse((_, at))) = ends.pop() else { return gone };
            let parent = self.remove(at);
            if let Some(parent) = parent
                && is_idle(self.node(parent))
            {
                ends.push(Reverse((self.node(parent).used, parent)));
            }
        }
        count
    }

    fn remove(&mut self, at: Place) -> Option<Place> {
        let Node { tokens, parent, .. } = self.nodes[at].take().expect("a place is removed once");
        self.free.push(at);
        match parent {
            None => self.roots.remove(&tokens),
            Some(parent) => self.node_mut(parent).children.remove(&tokens),
        };
        parent
    }

    fn node(&self, at: Place) -> &Node {
        self.nodes[at].as_ref().expect("a place that is held is in the tree")
    }

    fn node_mut(&mut self, at: Place) -> &mut Node {
        self.nodes[at].as_mut().expect("a place that is held is in the tree")
    }
}

/// At the end of a text that nobody reads.
fn is_idle(node: &Node) -> bool {
    node.children.is_empty() && !node.page.is_shared()
}
