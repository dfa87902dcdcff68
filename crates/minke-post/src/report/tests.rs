use super::*;
use crate::metrics::Sample;

/// A run of reinforcement learning that looks like one.
pub(crate) fn records(steps: u64) -> Vec<Record> {
    let mut records = Vec::new();
    let sample = |step: u64, text: &str, verdict: &str| {
        let prompt = "What is (3 + 4) * 5 mod 7?".to_owned();
        Record::Sample(Sample { step, prompt, text: text.to_owned(), verdict: verdict.to_owned() })
    };
    for step in 0..=steps {
        let done = step as f64 / steps as f64;
        let noise = ((step * 7919) % 101) as f64 / 101.0 - 0.5;
        let elapsed_s = step as f64 * 0.7;
        if step % (steps / 8).max(1) == 0 {
            let mut values = Values { step, elapsed_s, ..Values::default() };
            values.put("pass@1", 0.3 + 0.6 * done);
            for (family, ease) in [("chain", 0.1), ("sort", 0.0), ("count", -0.1)] {
                values.put(format!("pass@1/{family}"), 0.3 + 0.6 * done + ease);
                for level in 1..=5 {
                    let harder = 0.08 * (f64::from(level) - 3.0);
                    values.put(format!("thought/{family}:{level}"), f64::from(level) * (10.0 + 10.0 * done));
                    values
                        .put(format!("pass@1/{family}:{level}"), (0.3 + 0.6 * done + ease - harder).min(1.0));
                }
            }
            values.put("thought", 20.0 + 60.0 * done);
            records.push(Record::Evaluation(values));
            let text = match step * 2 / steps {
                0 => "35</think>5",
                1 => "```3+4=7\n7*5=35</think>1",
                _ => "3+4=7\n7*5=35\n35-35=0</think>0",
            };
            records.push(sample(step, text, if step == steps { "right" } else { "wrong" }));
        }
        if step > 0 {
            let mut values = Values { step, elapsed_s, ..Values::default() };
            for (name, value) in [
                ("reward", 0.3 + 0.6 * done + 0.1 * noise),
                ("thought", 20.0 + 60.0 * done + 8.0 * noise),
                ("entropy", 0.9 - 0.6 * done + 0.05 * noise),
                ("signal", 0.7 - 0.4 * done + 0.2 * noise),
                ("kl_rollout", 0.0),
                ("loss", 0.02 * noise),
                ("max_violation", 0.4 + 0.1 * noise),
                ("lr", 1e-4),
                ("tok_s", 4000.0 + 300.0 * noise),
                ("nothing", f64::NAN),
            ] {
                values.put(name, value);
            }
            records.push(Record::Step(values));
        }
    }
    records
}

fn heading() -> Heading {
    Heading {
        name: "tiny-rl".into(),
        kind: "grpo".into(),
        facts: vec![("loss | name".into(), "dapo".into())],
    }
}

#[test]
fn the_report_says_what_was_reached() {
    let records = records(80);
    let plots = plots(&records).unwrap();
    let files: Vec<&str> = plots.iter().map(|plot| &plot.file[..]).collect();
    assert_eq!(
        files,
        [
            "reward.svg",
            "pass.svg",
            "pass-families.svg",
            "thought.svg",
            "thought-levels.svg",
            "entropy.svg",
            "signal.svg",
            "kl-rollout.svg",
            "balance.svg",
            "loss.svg",
            "learning-rate.svg",
            "speed.svg"
        ]
    );
    let text = markdown(&heading(), &records, &plots);
    for part in [
        "# tiny-rl\n",
        "| loss \\| name | dapo |",
        "| steps | 80 |",
        "| KL(rollout‖trainer), largest of all steps | 0 |",
        "| | after 0 steps | after 80 steps |",
        "| pass@1 | 30.0 % | 90.0 % |",
        "| pass@1/chain:5 | 24.0 % | 84.0 % |",
        "| thought | 20.000 | 80.000 |",
        "![pass@1 on held-out problems](plots/pass.svg)",
        "after 40 steps (wrong):\n\n````text\n```3+4=7",
        "after 80 steps (right):",
    ] {
        assert!(text.contains(part), "{part}\n{text}");
    }
    // families with their levels under them, all of them under the whole
    let rows: Vec<usize> =
        ["| pass@1 |", "| pass@1/chain |", "| pass@1/chain:1 |", "| pass@1/chain:2 |", "| pass@1/count |"]
            .iter()
            .map(|row| text.find(row).unwrap())
            .collect();
    assert!(rows.is_sorted(), "{rows:?}");
}

#[test]
fn a_report_is_written_from_the_metrics_of_a_folder() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String =
        records(16).iter().map(|record| serde_json::to_string(record).unwrap() + "\n").collect();
    fs::write(folder.path().join("metrics.jsonl"), lines).unwrap();
    let path = write(folder.path(), &heading()).unwrap();
    let text = fs::read_to_string(path).unwrap();
    for (start, _) in text.match_indices("(plots/") {
        let link = &text[start + 1..start + text[start..].find(')').unwrap()];
        let svg = fs::read_to_string(folder.path().join(link)).unwrap();
        assert!(svg.starts_with("<svg") && svg.trim_end().ends_with("</svg>"), "{link}");
    }
}

#[test]
fn a_run_without_evaluations_or_samples_has_a_report_too() {
    let mut values = Values { step: 1, elapsed_s: 0.5, ..Values::default() };
    values.put("loss", 2.5);
    let records = [Record::Step(values)];
    let plots = plots(&records).unwrap();
    assert_eq!(plots.iter().map(|plot| &plot.file[..]).collect::<Vec<_>>(), ["loss.svg"]);
    let text = markdown(&heading(), &records, &plots);
    assert!(!text.contains("held-out") && !text.contains("Answers"), "{text}");
    assert!(plots[0].svg.contains("Loss"));
    let empty = super::plots(&[]).unwrap();
    assert!(empty.is_empty());
}
