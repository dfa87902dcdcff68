use super::*;
use crate::shards::tests::{write_counting, write_with_contexts};
use proptest::prelude::*;

fn shards(lengths: &[usize]) -> ShardSet {
    let folder = tempfile::tempdir().unwrap();
    let paths = [folder.path().join("a"), folder.path().join("b")];
    let half = lengths.len().div_ceil(2);
    if half == lengths.len() {
        write_counting(&paths[0], lengths, 0);
        return ShardSet::open(&paths[..1]).unwrap();
    }
    write_counting(&paths[0], &lengths[..half], 0);
    write_counting(&paths[1], &lengths[half..], lengths[..half].iter().sum());
    // the maps outlive the folder
    ShardSet::open(&paths).unwrap()
}

fn options(sequence_len: usize, batch: usize, mtp_depth: usize, document_borders: bool) -> LoaderOptions {
    let packing = Packing::Stream;
    LoaderOptions { sequence_len, batch, seed: 7, mtp_depth, document_borders, packing }
}

fn whole(sequence_len: usize, batch: usize, mtp_depth: usize) -> LoaderOptions {
    LoaderOptions { packing: Packing::Whole, ..options(sequence_len, batch, mtp_depth, true) }
}

fn with_contexts(documents: &[(usize, usize)]) -> ShardSet {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a");
    write_with_contexts(&path, documents, 0);
    ShardSet::open(&[path]).unwrap()
}

#[test]
fn permutations_are_permutations() {
    for n in (1..70).chain([255, 256, 257, 1000, 4097]) {
        let mut seen = vec![false; n as usize];
        for at in 0..n {
            let to = permute(at, n, 3, 1);
            assert!(!std::mem::replace(&mut seen[to as usize], true), "{n}: {to} twice");
        }
    }
    let orders: Vec<Vec<u64>> = [(1, 0), (1, 1), (2, 0)]
        .iter()
        .map(|&(s, e)| (0..1000).map(|at| permute(at, 1000, s, e)).collect())
        .collect();
    assert!(orders[0] != orders[1] && orders[0] != orders[2] && orders[1] != orders[2]);
    let moved = orders[0].iter().enumerate().filter(|(at, to)| *at as u64 != **to).count();
    let rising = orders[0].windows(2).filter(|pair| pair[0] < pair[1]).count();
    assert!(moved > 980 && (430..570).contains(&rising), "{moved} {rising}");
    assert!(permute(u64::MAX - 1, u64::MAX, 1, 1) < u64::MAX);
}

#[test]
fn an_epoch_visits_every_window_once() {
    let loader = Loader::new(shards(&[40, 3, 90, 11]), options(8, 3, 2, true)).unwrap();
    let n = loader.windows();
    assert_eq!(n, (40 + 3 + 90 + 11 + 8 - 3) / 8);
    for epoch in 0..3 {
        let draws = epoch * n..(epoch + 1) * n;
        let mut windows: Vec<u64> = draws.map(|draw| loader.window(draw / 3, (draw % 3) as usize)).collect();
        windows.sort_unstable();
        assert_eq!(windows, (0..n).collect::<Vec<_>>());
    }
}

#[test]
fn a_batch_depends_on_seed_and_step_only() {
    let set = shards(&[400, 30, 90]);
    let loader = Loader::new(set.clone(), options(16, 4, 1, true)).unwrap();
    let forward: Vec<Batch> = (0..20).map(|step| loader.batch(step).unwrap()).collect();
    let again = Loader::new(set.clone(), options(16, 4, 1, true)).unwrap();
    for step in (0..20).rev() {
        assert_eq!(again.batch(step).unwrap(), forward[step as usize]);
    }
    let other = Loader::new(set, LoaderOptions { seed: 8, ..options(16, 4, 1, true) }).unwrap();
    assert_ne!(other.batch(0).unwrap(), forward[0]);
}

#[test]
fn a_row_by_hand() {
    // the stream: bos 16 17 18 eos | bos 19 20 eos
    for borders in [false, true] {
        let evaluation = Evaluation::new(shards(&[3, 2]), options(8, 1, 1, borders)).unwrap();
        assert_eq!(evaluation.batches(), 1);
        let batch = evaluation.batch(0).unwrap();
        assert_eq!(batch.tokens_bt, [0, 16, 17, 18, 1, 0, 19, 20]);
        let gap = if borders { NO_LABEL } else { 0 };
        assert_eq!(batch.labels_bt[0], [16, 17, 18, 1, gap, 19, 20, 1]);
        let n = NO_LABEL;
        assert_eq!(batch.labels_bt[1], [17, 18, 1, n, n, 20, 1, n]);
        let segments: Vec<(usize, usize)> = batch.segments.iter().map(|s| (s.start, s.len)).collect();
        if borders {
            assert_eq!(segments, [(0, 5), (5, 3)]);
            assert_eq!(batch.positions_bt, [0, 1, 2, 3, 4, 0, 1, 2]);
        } else {
            assert_eq!(segments, [(0, 8)]);
            assert_eq!(batch.positions_bt, [0, 1, 2, 3, 4, 5, 6, 7]);
        }
        assert_eq!(batch.text_bytes, 15);
        assert_eq!(batch.label_count(0), if borders { 7 } else { 8 });
    }
}

#[test]
fn whole_documents_by_hand() {
    // as tokens: 5, 8, 4 and 14 with their ends, so 4, 7, 3 and 13 positions, of which 8 and 5
    let loader = Loader::new(shards(&[3, 6, 2, 12]), whole(8, 1, 2)).unwrap();
    let Windows::Whole(plan) = &loader.windows else { panic!("whole documents") };
    let windows: Vec<&[u64]> = (0..plan.windows()).map(|window| plan.pieces(window)).collect();
    // the piece that fills a window goes at once, the third document fits best behind the first
    assert_eq!(windows, [&[17][..], &[0, 13], &[5], &[25]]);
    assert_eq!(loader.padding_share(), (1 + 1 + 3) as f64 / 32.0);
    let rows = |number| build(&loader.shards, &loader.options, &loader.windows, &[number]).unwrap();
    let n = NO_LABEL;
    let batch = rows(1);
    assert_eq!(batch.windows_bt, [0, 16, 17, 18, 0, 25, 26, 0, 0, 0, 0]);
    assert_eq!(batch.tokens_bt, batch.windows_bt[..8]);
    assert_eq!(batch.labels_bt[0], [16, 17, 18, 1, 25, 26, 1, n]);
    assert_eq!(batch.labels_bt[1], [17, 18, 1, n, 26, 1, n, n]);
    assert_eq!(batch.labels_bt[2], [18, 1, n, n, 1, n, n, n]);
    assert_eq!(batch.positions_bt, [0, 1, 2, 3, 0, 1, 2, 0]);
    let segments: Vec<(usize, usize)> = batch.segments.iter().map(|s| (s.start, s.len)).collect();
    assert_eq!(segments, [(0, 4), (4, 3)]);
    assert_eq!(batch.text_bytes, 15);
    // a cut document: its next tokens are labels, and the modules read them
    let batch = rows(0);
    assert_eq!(
        batch.windows_bt,
        (27..34).fold(vec![0], |w, t| [w, vec![t]].concat()).into_iter().chain(34..37).collect::<Vec<_>>()
    );
    assert_eq!(batch.labels_bt[2], (29..37).collect::<Vec<u32>>());
}

#[test]
fn contexts_are_read_and_not_learned() {
    let n = NO_LABEL;
    // the stream: bos 16 17 | 18 19 eos, bos 20 eos
    let set = with_contexts(&[(4, 2), (1, 0)]);
    let first = Evaluation::new(set.clone(), whole(8, 1, 1)).unwrap().batch(0).unwrap();
    assert_eq!(first.tokens_bt, [0, 16, 17, 18, 19, 0, 20, 0]);
    assert_eq!(first.labels_bt[0], [n, n, 18, 19, 1, 20, 1, n]);
    assert_eq!(first.labels_bt[1], [n, 18, 19, 1, n, 1, n, n]);
    assert_eq!(first.text_bytes, 9);
    let cut = Evaluation::new(set, options(8, 1, 1, false)).unwrap().batch(0).unwrap();
    assert_eq!(cut.labels_bt[0], [n, n, 18, 19, 1, 0, 20, 1]);
    assert_eq!(cut.labels_bt[1], [n, 18, 19, 1, n, n, 1, n]);
    assert_eq!(cut.text_bytes, 9);
}

#[test]
fn packing_whole_documents_wastes_little() {
    let lengths: Vec<usize> = (0..3000).map(|i| 20 + (i * 7919) % 180).collect();
    let loader = Loader::new(shards(&lengths), whole(256, 4, 0)).unwrap();
    assert!(loader.padding_share() < 0.02, "{}", loader.padding_share());
}

#[test]
fn impossible_settings_are_errors() {
    let set = shards(&[3]);
    for bad in
        [options(0, 1, 0, true), options(1, 0, 0, true), options(1, 1, 99, true), options(5, 1, 0, true)]
    {
        assert!(Loader::new(set.clone(), bad).is_err(), "{bad:?}");
    }
    assert!(Loader::new(set.clone(), options(4, 1, 0, true)).is_ok());
    let error = Loader::new(set, LoaderOptions { document_borders: false, ..whole(4, 1, 0) }).unwrap_err();
    assert!(error.to_string().contains("document borders"), "{error}");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn whole_packing_laws(
        documents in prop::collection::vec((0usize..25, 0usize..25), 1..150),
        len in 1usize..40,
        rows in 1usize..4,
        depth in 0usize..4,
    ) {
        let documents: Vec<_> = documents.into_iter().map(|(length, c)| (length, c.min(length))).collect();
        let set = with_contexts(&documents);
        let mut stream = vec![0; set.tokens() as usize];
        set.read(0, &mut stream).unwrap();
        let spans: Vec<DocumentSpan> = (0..set.documents()).map(|number| set.document(number)).collect();
        // how often a token was read, and how often it was a label at each depth
        let mut read = vec![0; stream.len()];
        let mut learned = vec![vec![0; stream.len()]; depth + 1];
        let evaluation = Evaluation::new(set.clone(), whole(len, rows, depth)).unwrap();
        let Windows::Whole(plan) = &evaluation.windows else { panic!("whole documents") };
        let (mut bytes, mut window) = (0, 0);
        for index in 0..evaluation.batches() {
            let batch = evaluation.batch(index).unwrap();
            bytes += batch.text_bytes;
            let mut segments = batch.segments.iter();
            let mut covered = vec![false; batch.rows * len];
            for row in 0..batch.rows {
                for &start in plan.pieces(window) {
                    let segment = segments.next().unwrap();
                    prop_assert_eq!(segment.row, row);
                    let span = &spans[set.document_at(start) as usize];
                    let first = span.tokens.start as usize;
                    // cut only where it takes more than a window, and there in pieces of a window
                    prop_assert_eq!((start as usize - first) % len, 0);
                    prop_assert_eq!(segment.len, (span.tokens.end as usize - 1 - start as usize).min(len));
                    for i in 0..segment.len {
                        let (from, at) = (start as usize + i, row * len + segment.start + i);
                        read[from] += 1;
                        prop_assert!(!std::mem::replace(&mut covered[at], true));
                        prop_assert_eq!(batch.tokens_bt[at], stream[from]);
                        prop_assert_eq!(batch.positions_bt[at], i as u32);
                        for (k, learned) in learned.iter_mut().enumerate() {
                            let to = from + k + 1;
                            let inside = to < span.tokens.end as usize && to >= first + span.context as usize;
                            prop_assert_eq!(batch.labels_bt[k][at], if inside { stream[to] } else { NO_LABEL });
                            if inside {
                                learned[to] += 1;
                                // a module reads the token before its label
                                let wide = len + 1 + depth;
                                let input = batch.windows_bt[row * wide + segment.start + i + k];
                                prop_assert_eq!(input, stream[to - 1]);
                            }
                        }
                    }
                }
                window += 1;
            }
            prop_assert!(segments.next().is_none());
            for (at, covered) in covered.iter().enumerate() {
                prop_assert!(*covered || (0..=depth).all(|k| batch.labels_bt[k][at] == NO_LABEL));
            }
        }
        prop_assert_eq!(window, evaluation.windows());
        for span in &spans {
            let (first, last) = (span.tokens.start as usize, span.tokens.end as usize - 1);
            prop_assert!(read[first..last].iter().all(|&times| times == 1) && read[last] == 0);
            for (k, learned) in learned.iter().enumerate() {
                let from = (first + k + 1).max(first + span.context as usize);
                for (at, &times) in learned.iter().enumerate().take(last + 1).skip(first) {
                    prop_assert_eq!(times, usize::from(at >= from));
                }
            }
        }
        prop_assert_eq!(bytes, set.text_bytes());

        let loader = Loader::new(set.clone(), whole(len, rows, depth)).unwrap();
        let again = Loader::new(set, whole(len, rows, depth)).unwrap();
        let batches: Vec<Batch> = (0..4).map(|step| loader.batch(step).unwrap()).collect();
        for step in (0..4).rev() {
            prop_assert_eq!(&again.batch(step).unwrap(), &batches[step as usize]);
        }
    }

    #[test]
    fn loader_laws(
        lengths in prop::collection::vec(0usize..25, 1..12),
        len in 1usize..12,
        rows in 1usize..4,
        depth in 0usize..4,
        borders: bool,
    ) {
        let set = shards(&lengths);
        let mut stream = vec![0; set.tokens() as usize];
        set.read(0, &mut stream).unwrap();
        let document: Vec<u64> = (0..set.tokens()).map(|token| set.document_at(token)).collect();
        let options = options(len, rows, depth, borders);
        let wide = len + 1 + depth;

        let evaluation = Evaluation::new(set.clone(), options).unwrap();
        let (mut bytes, mut labelled, mut next) = (0, 0, 0);
        let mut batches: Vec<(Batch, Vec<u64>)> = Vec::new();
        for index in 0..evaluation.batches() {
            let batch = evaluation.batch(index).unwrap();
            bytes += batch.text_bytes;
            labelled += batch.label_count(0) as u64;
            let starts = (0..batch.rows as u64).map(|row| (next + row) * len as u64).collect();
            next += batch.rows as u64;
            batches.push((batch, starts));
        }
        // everything but the first token is predicted once; with borders, but each document's first
        let unpredicted = if borders { set.documents() } else { 1 };
        prop_assert_eq!(labelled, set.tokens() - unpredicted);
        prop_assert_eq!(bytes, set.text_bytes());

        if let Ok(loader) = Loader::new(set.clone(), options) {
            for step in 0..4 {
                let starts = (0..rows).map(|row| loader.window(step, row) * len as u64).collect();
                batches.push((loader.batch(step).unwrap(), starts));
            }
        }
        for (batch, starts) in &batches {
            let covered: usize = batch.segments.iter().map(|s| s.len).sum();
            prop_assert_eq!(covered, batch.rows * len);
            for (row, &start) in starts.iter().enumerate() {
                let start = start as usize;
                for i in 0..len {
                    let at = row * len + i;
                    prop_assert_eq!(batch.tokens_bt[at], batch.windows_bt[row * wide + i]);
                    let held = start + i < stream.len();
                    if held {
                        prop_assert_eq!(batch.tokens_bt[at], stream[start + i]);
                    }
                    for k in 0..=depth {
                        let to = start + i + k + 1;
                        let same = to < stream.len() && document[start + i] == document[to];
                        let expected = same || (k == 0 && !borders && to < stream.len());
                        let label = batch.labels_bt[k][at];
                        prop_assert_eq!(label, if expected { stream[to] } else { NO_LABEL });
                    }
                }
                if !borders {
                    continue;
                }
                for segment in batch.segments.iter().filter(|s| s.row == row) {
                    let tokens = start + segment.start..(start + segment.start + segment.len).min(stream.len());
                    prop_assert!(tokens.clone().all(|token| document[token] == document[tokens.start]));
                    for i in 0..segment.len {
                        prop_assert_eq!(batch.positions_bt[row * len + segment.start + i], i as u32);
                    }
                }
            }
        }
    }
}
