//! What every family promises.

use std::collections::BTreeSet;

use crate::{Care, Draw, Split, families, problem};

#[test]
fn names_are_unique_and_found() {
    let names: BTreeSet<&str> = families().iter().copied().map(crate::Family::name).collect();
    assert_eq!(names.len(), families().len());
    for name in names {
        assert!(name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-'), "{name}");
        assert_eq!(super::family(name).map(crate::Family::name), Some(name));
    }
}

#[test]
fn answers_pass_and_others_do_not() {
    for family in families() {
        for level in 1..=family.levels() {
            let mut fooled = 0;
            for index in 0..40 {
                let one = problem(*family, level, Split::Train, 1, index);
                let answer = family.answer(&one.key);
                assert!(family.verify(&one.key, &answer), "{one:?}: {answer:?}");
                assert!(family.verify(&one.key, &format!(" {answer}\n")), "{one:?}: {answer:?} in blanks");
                for wrong in ["", "?", "I do not know", "\u{0}", "{}", "((((", "-", "/", "1/0"] {
                    assert!(!family.verify(&one.key, wrong), "{one:?}: {wrong:?} passes");
                }
                // another problem's answer may be right by chance, but not as a rule
                let other = problem(*family, level, Split::Train, 2, index);
                fooled +=
                    usize::from(other.key != one.key && family.verify(&one.key, &family.answer(&other.key)));
            }
            assert!(
                fooled <= 28,
                "{} level {level}: {fooled} of 40 answers of other problems pass",
                family.name()
            );
        }
    }
}

#[test]
fn problems_repeat_and_splits_share_none() {
    for family in families() {
        for level in 1..=family.levels() {
            let keys = |split, seed| -> BTreeSet<String> {
                (0..60).map(|index| problem(*family, level, split, seed, index).key).collect()
            };
            let (train, held_out) = (keys(Split::Train, 1), keys(Split::HeldOut, 1));
            assert_eq!(train, keys(Split::Train, 1));
            assert!(train.is_disjoint(&held_out), "{} level {level}", family.name());
            assert!(
                held_out.len() >= 12,
                "{} level {level}: {} held-out problems",
                family.name(),
                held_out.len()
            );
        }
    }
}

#[test]
fn worked_answers_are_right_and_care_takes_lines() {
    for family in families() {
        let (mut full, mut brief) = (0, 0);
        for level in 1..=family.levels() {
            for index in 0..30 {
                let one = problem(*family, level, Split::Train, 3, index);
                let work = |care| family.work(&one.key, care, &mut Draw::new(5, index));
                let Some(said) = work(Care::None) else { continue };
                assert_eq!(said.thought, "", "{one:?}");
                let (long, short) = (work(Care::Full).unwrap(), work(Care::Brief).unwrap());
                for work in [&said, &long, &short] {
                    assert!(family.verify(&one.key, &work.answer), "{one:?}: {work:?}");
                }
                assert!(!long.thought.is_empty(), "{one:?}");
                full += long.thought.len();
                brief += short.thought.len();
            }
        }
        assert!(
            full == 0 || full > brief,
            "{}: {full} bytes with full care, {brief} in brief",
            family.name()
        );
    }
}
