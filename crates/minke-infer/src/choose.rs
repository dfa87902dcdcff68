//! A token for each row of logits that asks for one.

use std::sync::OnceLock;

use minke_cpu::policy::{self, Kept};
use minke_cpu::{Cpu, loss};
use minke_num::rng;

use crate::penalties::{self, History};
use crate::sampling::{self, Allowed, Left, Sampler, Sampling};

/// Who asks for a token, and what it depends on beside the logits.
pub(crate) struct Ask<'a> {
    pub sampling: &'a Sampling,
    /// What is added to logits.
    pub bias: &'a [(u32, f32)],
    /// What came before, where penalties ask for it.
    pub history: Option<&'a History>,
    /// What is taken to come behind that, before the token that is asked for.
    pub ahead: &'a [u32],
    /// What may come.
    pub allowed: Allowed,
    /// Names the draw, beside the seed and the position.
    pub sequence: u64,
    /// Tokens before the one that is asked for.
    pub position: usize,
}

impl Ask<'_> {
    /// Whether the logits are not what they are drawn from.
    fn adjusts(&self) -> bool {
        !self.bias.is_empty() || self.history.is_some()
    }
}

/// A token that was chosen.
#[derive(Debug, Default)]
pub(crate) struct Choice {
    pub id: u32,
    /// Of the distribution that it was drawn from; 0 where there was no draw.
    pub log_prob: f32,
    /// Whether that is the model's own distribution.
    pub plain: bool,
    /// What filters left; nothing where all was left.
    pub kept: Vec<u32>,
}

/// Why there is no token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unchosen {
    /// No logit is a number.
    NotANumber,
    /// Of what may come nothing has a chance.
    Nothing,
}

/// A token for each row; a row that gives none spoils no other.
///
/// Rows of one temperature are tempered and drawn from together, by the functions that training uses. logits: [asks, w].
pub(crate) fn choose(
    cpu: &Cpu,
    sampler: &Sampler,
    asks: &[Ask<'_>],
    logits: &[f32],
    w: usize,
) -> Vec<Result<Choice, Unchosen>> {
    let mut choices: Vec<Result<Choice, Unchosen>> = asks.iter().map(|_| Ok(Choice::default())).collect();
    let adjusted: Vec<Option<Vec<f32>>> = asks.iter().zip(logits.chunks_exact(w)).map(adjusted).collect();
    let row_of = |row: usize| adjusted[row].as_deref().unwrap_or(&logits[row * w..(row + 1) * w]);
    let likeliest = |row: usize| match sampling::likeliest(row_of(row), &asks[row].allowed) {
        Some((id, _)) => Ok(id),
        None if asks[row].allowed == Allowed::All => Err(Unchosen::NotANumber),
        None if sampling::likeliest(row_of(row), &Allowed::All).is_none() => Err(Unchosen::NotANumber),
        None => Err(Unchosen::Nothing),
    };
    // a filter goes through all of its row
    let left: Vec<OnceLock<Left>> = asks.iter().map(|_| OnceLock::new()).collect();
    cpu.run(asks.len(), |row| {
        let Ask { sampling, allowed, .. } = &asks[row];
        if sampling.temperature != 0.0 {
            left[row].get_or_init(|| sampler.kept(sampling, row_of(row), allowed));
        }
    });
    let mut temperatures: Vec<f32> = asks.iter().map(|ask| ask.sampling.temperature).collect();
    temperatures.sort_by(f32::total_cmp);
    temperatures.dedup();
    for temperature in temperatures {
        let mut rows: Vec<usize> =
            (0..asks.len()).filter(|&row| asks[row].sampling.temperature == temperature).collect();
        if temperature == 0.0 {
            for &row in &rows {
                choices[row] = likeliest(row).map(|id| Choice { id, ..Choice::default() });
            }
            continue;
        }
        let mut kept = Kept::default();
        rows.retain(|&row| {
            match left[row].get().expect("a row that is drawn from was filtered") {
                Left::All => kept.push([]),
                Left::Some(ids) => kept.push(ids.iter().copied()),
                // says whether it is a number that is lacking
                Left::Nothing => {
                    choices[row] = likeliest(row).map(|id| Choice { id, ..Choice::default() });
                    return false;
                }
            }
            true
        });
        if rows.is_empty() {
            continue;
        }
        let uniforms: Vec<f64> = rows.iter().map(|&row| uniform(&asks[row])).collect();
        let tempered: Vec<f32>;
        let is_adjusted = rows.iter().any(|&row| adjusted[row].is_some());
        let as_they_are =
            rows.len() == asks.len() && temperature == 1.0 && kept.ids.is_empty() && !is_adjusted;
        let from = if as_they_are {
            logits
        } else {
            let mut copy: Vec<f32> = rows.iter().flat_map(|&row| row_of(row)).copied().collect();
            policy::temper(cpu, &mut copy, w, temperature, &kept);
            tempered = copy;
            &tempered
        };
        let (mut ids, mut log_probs) = (vec![0; rows.len()], vec![0.0; rows.len()]);
        policy::draw(cpu, from, w, &uniforms, &mut ids, &mut log_probs);
        for (i, &row) in rows.iter().enumerate() {
            // an infinite logit leaves nothing to draw, and no number at all is an error
            let id = if ids[i] == u32::MAX { likeliest(row) } else { Ok(ids[i]) };
            choices[row] = id.map(|id| {
                let kept = kept.row(i).to_vec();
                let plain = temperature == 1.0 && kept.is_empty() && id == ids[i] && adjusted[row].is_none();
                Choice { id, log_prob: log_probs[i], plain, kept }
            });
        }
    }
    choices
}

/// The number in [0, 1) that a token is drawn by: a function of seed, sequence and position, whatever else is drawn.
fn uniform(ask: &Ask<'_>) -> f64 {
    rng::uniform_f64(ask.sampling.seed, ask.sequence, ask.position as u64)
}

/// The row with bias and penalties, if there are any.
fn adjusted((ask, row): (&Ask<'_>, &[f32])) -> Option<Vec<f32>> {
    ask.adjusts().then(|| {
        let mut row = row.to_vec();
        penalties::adjust(&mut row, ask.sampling, ask.bias, ask.history, ask.ahead);
        row
    })
}

/// The log-probability of each choice before bias, penalties, temperature and filters. Where there were none the draw
/// has said it, to the bit, and its row is not gone through again. logits: [choices, w].
pub(crate) fn log_probs(
    cpu: &Cpu,
    logits: &[f32],
    w: usize,
    choices: &[Result<Choice, Unchosen>],
) -> Vec<f32> {
    let label = |choice: &Result<Choice, Unchosen>| match choice {
        Ok(choice) if !choice.plain => choice.id,
        _ => loss::IGNORED,
    };
    let labels: Vec<u32> = choices.iter().map(label).collect();
    let mut log_probs = vec![0.0; choices.len()];
    loss::log_probs(cpu, logits, w, &labels, &mut log_probs);
    for (log_prob, choice) in log_probs.iter_mut().zip(choices) {
        if let Ok(Choice { log_prob: drawn, plain: true, .. }) = choice {
            *log_prob = *drawn;
        }
    }
    log_probs
}

/// The n likeliest tokens of a row and their log-probabilities, the likeliest first, ties by id: the bits of
/// [`log_probs`]. What is no number is left out.
pub(crate) fn top(cpu: &Cpu, row: &[f32], n: usize) -> Vec<(u32, f32)> {
    let mut order: Vec<u32> = (0..row.len() as u32).filter(|&id| !row[id as usize].is_nan()).collect();
    let likelier = |a: &u32, b: &u32| row[*b as usize].total_cmp(&row[*a as usize]).then(a.cmp(b));
    if n < order.len() {
        order.select_nth_unstable_by(n, likelier);
        order.truncate(n);
    }
    order.sort_unstable_by(likelier);
    let Some(&first) = order.first() else { return Vec::new() };
    // of the likeliest it is minus the logarithm of the sum, and so for the others too
    let (max, mut of_max) = (row[first as usize], [0.0]);
    loss::log_probs(cpu, row, row.len(), &[first], &mut of_max);
    order.into_iter().map(|id| (id, (row[id as usize] - max) + of_max[0])).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ask(sampling: &Sampling, allowed: Allowed, position: usize) -> Ask<'_> {
        Ask { sampling, bias: &[], history: None, ahead: &[], allowed, sequence: 3, position }
    }

    fn row(w: usize, seed: u64) -> Vec<f32> {
        (0..w as u64).map(|i| rng::uniform_f64(seed, 1, i) as f32 * 6.0 - 3.0).collect()
    }

    /// What is forbidden is never drawn, and a draw does not depend on what is drawn beside it.
    #[test]
    fn rows_are_drawn_each_for_itself_from_what_may_come() {
        let cpu = Cpu::detect(2);
        let w = 50;
        let warm = Sampling { temperature: 0.8, top_p: 0.9, ..Sampling::default() };
        let hot = Sampling { temperature: 1.0, ..Sampling::default() };
        let greedy = Sampling::greedy();
        let only = || Allowed::Only([3, 9, 27].into());
        let except = || Allowed::Except((0..45).collect());
        let asks: Vec<Ask<'_>> = (0..30)
            .map(|at| {
                let allowed = [Allowed::All, only(), except()][at % 3].clone();
                ask([&warm, &hot, &greedy, &warm][at % 4], allowed, at)
            })
            .collect();
        let logits: Vec<f32> = (0..30).flat_map(|seed| row(w, seed)).collect();
        let sampler = Sampler::default();
        let together = choose(&cpu, &sampler, &asks, &logits, w);
        for (at, (ask, choice)) in asks.iter().zip(&together).enumerate() {
            let choice = choice.as_ref().unwrap();
            assert!(ask.allowed.has(choice.id));
            let logits = &logits[at * w..(at + 1) * w];
            let alone = choose(&cpu, &sampler, std::slice::from_ref(ask), logits, w);
            let alone = alone[0].as_ref().unwrap();
            assert_eq!((alone.id, alone.log_prob.to_bits()), (choice.id, choice.log_prob.to_bits()));
            if !choice.kept.is_empty() {
                assert!(choice.kept.contains(&choice.id));
                assert!(choice.kept.iter().all(|&id| ask.allowed.has(id)));
            }
        }
    }

    #[test]
    fn a_row_without_a_way_on_says_why() {
        let cpu = Cpu::detect(1);
        let (warm, greedy) = (Sampling::default(), Sampling::greedy());
        for sampling in [&warm, &greedy] {
            let sampler = Sampler::default();
            let one = |allowed, logits: &[f32]| {
                let asks = [ask(sampling, allowed, 0)];
                choose(&cpu, &sampler, &asks, logits, logits.len()).remove(0).map(|choice| choice.id)
            };
            let low = f32::NEG_INFINITY;
            assert_eq!(one(Allowed::Only([0].into()), &[low, 1.0]), Err(Unchosen::Nothing));
            assert_eq!(one(Allowed::Only([].into()), &[0.0, 1.0]), Err(Unchosen::Nothing));
            assert_eq!(one(Allowed::Only([0].into()), &[f32::NAN, low]), Err(Unchosen::NotANumber));
            assert_eq!(one(Allowed::All, &[f32::NAN, low]), Err(Unchosen::NotANumber));
            assert_eq!(one(Allowed::Only([0].into()), &[0.0, f32::INFINITY]), Ok(0));
            assert_eq!(one(Allowed::All, &[0.0, f32::INFINITY]), Ok(1));
        }
    }

    #[test]
    fn the_likeliest_have_the_bits_of_scoring() {
        let cpu = Cpu::detect(1);
        let mut logits = row(77, 5);
        logits[5] = logits[6];
        let top = top(&cpu, &logits, 10);
        assert_eq!(top.len(), 10);
        assert!(top.is_sorted_by(|a, b| a.1 > b.1 || a.1 == b.1 && a.0 < b.0));
        for (id, log_prob) in top {
            let mut expected = [0.0];
            loss::log_probs(&cpu, &logits, 77, &[id], &mut expected);
            assert_eq!(log_prob.to_bits(), expected[0].to_bits());
        }
        assert!(super::top(&cpu, &[f32::NAN], 3).is_empty());
        assert_eq!(super::top(&cpu, &logits, 1000).len(), 77);
    }

    /// `scripts/sampling_vectors.py` made them.
    #[test]
    fn settings_do_what_they_do_in_transformers() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/vectors/sampling.json");
        let vectors: serde_json::Value = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        let floats = |value: &serde_json::Value| -> Vec<f32> {
            value.as_array().unwrap().iter().map(|x| x.as_f64().unwrap() as f32).collect()
        };
        let ids = |value: &serde_json::Value| -> Vec<u32> {
            value.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u32).collect()
        };
        let cases = vectors["cases"].as_array().unwrap();
        assert_eq!(cases.len(), 40);
        for case in cases {
            let setting = &case["setting"];
            let number = |name: &str, default: f64| setting[name].as_f64().unwrap_or(default) as f32;
            let sampling = Sampling {
                temperature: number("temperature", 1.0),
                top_k: number("top_k", 0.0) as usize,
                top_p: number("top_p", 1.0),
                min_p: number("min_p", 0.0),
                typical_p: number("typical_p", 1.0),
                repetition_penalty: number("repetition_penalty", 1.0),
                ..Sampling::default()
            };
            let bias: Vec<(u32, f32)> = setting["logit_bias"].as_array().map_or(Vec::new(), |bias| {
                bias.iter().map(|pair| (pair[0].as_u64().unwrap() as u32, floats(pair)[1])).collect()
            });
            let history = sampling.has_penalties().then(|| History::new(&ids(&case["tokens"])));
            let ask = Ask { bias: &bias, history: history.as_ref(), ..ask(&sampling, Allowed::All, 0) };
            let logits = floats(&case["logits"]);
            let row = adjusted((&ask, &logits)).unwrap_or(logits);
            for (got, expected) in row.iter().zip(floats(&case["changed"])) {
                assert!(
                    (got - expected).abs() <= 1e-6 * expected.abs().max(1.0),
                    "{setting}: {got} {expected}"
                );
            }
            let left = match Sampler::default().kept(&sampling, &row, &Allowed::All) {
                Left::Some(mut ids) => {
                    ids.sort_unstable();
                    ids
                }
                all => {
                    assert_eq!(all, Left::All);
                    (0..64).collect()
                }
            };
            assert_eq!(left, ids(&case["kept"]), "{setting}");
        }
    }
}
