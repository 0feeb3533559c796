//! How much memory there is, and what is said to a job that needs more.

use std::fs;

use crate::domain::{MemoryEstimate, Saving};

/// Bytes that a job may take now: the operator's limit, or what the machine and the container leave. None where neither
/// is known.
pub fn available(limit: Option<u64>) -> Option<u64> {
    limit.or_else(|| [of_the_machine(), of_the_container()].into_iter().flatten().min())
}

fn of_the_machine() -> Option<u64> {
    let text = fs::read_to_string("/proc/meminfo").ok()?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
    let kilobytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
    Some(kilobytes << 10)
}

/// What a control group leaves, its page cache not counted: version 2, then version 1.
fn of_the_container() -> Option<u64> {
    let two = ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file ");
    let one = ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file ");
    [two, one].into_iter().find_map(|(dir, limit, used, cache)| {
        let read = |name: &str| fs::read_to_string(format!("{dir}/{name}")).ok();
        let number = |name: &str| read(name)?.trim().parse::<u64>().ok();
        let stat = read("memory.stat").unwrap_or_default();
        let cached = stat.lines().find_map(|line| line.strip_prefix(cache)?.trim().parse().ok()).unwrap_or(0u64);
        Some(number(limit)?.saturating_sub(number(used)?.saturating_sub(cached)))
    })
}

/// Why the run does not fit, and what would make it smaller.
pub fn refusal(need: &MemoryEstimate, available: u64) -> Option<String> {
    if need.peak <= available {
        return None;
    }
    let fits = |saving: &Saving| if saving.peak <= available { ", which fits" } else { "" };
    let smaller: Vec<String> = (need.savings.iter())
        .map(|saving| format!("{} {}: {}{}", saving.param, saving.value, amount(saving.peak), fits(saving)))
        .collect();
    let hint = match smaller.is_empty() {
        true => "it needs a machine with more memory, or a smaller adapter".to_owned(),
        false => format!("smaller are {}", smaller.join("; ")),
    };
    let (peak, activations) = (amount(need.peak), amount(need.activations));
    Some(format!(
        "training would need about {peak} of memory beside the base ({activations} of it activations), and {} are \
         available; {hint}",
        amount(available)
    ))
}

/// `1.4 GiB`
pub fn amount(bytes: u64) -> String {
    let mut value = bytes as f64 / 1024.0;
    let mut unit = "KiB";
    for larger in ["MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        (value, unit) = (value / 1024.0, larger);
    }
    format!("{value:.1} {unit}")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    #[test]
    fn a_refusal_names_what_helps() {
        assert_eq!(available(Some(7)), Some(7));
        assert!(available(None).is_none_or(|bytes| bytes > 1 << 20));
        let saving = |param: &str, peak| Saving { param: param.to_owned(), value: json!(true), peak };
        let savings = vec![saving("training.gradient_checkpointing", 1 << 29), saving("b", 2 << 30)];
        let need = MemoryEstimate { peak: 3 << 30, activations: 5 << 29, savings, ..MemoryEstimate::default() };
        assert_eq!(refusal(&need, 3 << 30), None);
        let text = refusal(&need, 1 << 30).unwrap();
        assert!(text.contains("about 3.0 GiB") && text.contains("2.5 GiB of it activations"), "{text}");
        assert!(
            text.ends_with("training.gradient_checkpointing true: 512.0 MiB, which fits; b true: 2.0 GiB"),
            "{text}"
        );
    }
}
