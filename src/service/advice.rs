//! Which method suits which data: the rules of thumb behind the order of recommendations.

use crate::domain::{BaseInfo, MethodSpec, RunEstimate};

/// Steps below which AdaLoRA has no time to move its budget.
const ADALORA_STEPS: u64 = 500;
/// Weights from which prompts alone steer a model well (Lester et al., arXiv 2104.08691).
const PROMPT_PARAMETERS: u64 = 5_000_000_000;
/// Rows up to which few trained values are an advantage.
const FEW_ROWS: u64 = 64;

/// From 0 to 100, and why. `run` is any run on the same data.
pub fn merit(method: &MethodSpec, base: &BaseInfo, run: &RunEstimate) -> (u32, String) {
    let is_4bit = ["Q4", "NF4", "FP4"].iter().any(|kind| base.storage.starts_with(kind));
    let is_few = run.rows <= FEW_ROWS;
    let is_large = base.parameters >= PROMPT_PARAMETERS;
    let (merit, why) = match method.type_name() {
        "qlora" if is_4bit => (79, "LoRA with QLoRA's settings, for a base that is stored in 4 bits"),
        "lora" => (80, "the best quality for its cost on demonstrations"),
        "dora" => (70, "as LoRA, a little better at low ranks and slower"),
        "adalora" if run.steps >= ADALORA_STEPS => (60, "moves its ranks to where they matter; there are steps enough"),
        "adalora" => (20, "needs more steps than this job has to move its ranks"),
        "ia3" if is_few => (75, "few rows: a handful of trained values cannot learn them by heart"),
        "ia3" => (45, "the smallest adapter that still reaches every layer; weak for large changes of behaviour"),
        "unipelt" if (100..=1000).contains(&run.rows) => {
            (50, "a few hundred rows: its gates choose among LoRA, prefix and adapter")
        }
        "unipelt" => (30, "for a few hundred rows when no method is known to work"),
        "prefix_tuning" | "p_tuning_v2" => (35, "steers style with keys and values alone; linears cost nothing more"),
        "prompt_tuning" | "p_tuning" if is_large => (55, "a large base follows a trained prompt, and it is tiny"),
        "prompt_tuning" | "p_tuning" => (15, "works on large bases; this one is small"),
        "moe_lora" => (25, "several experts: for mixtures of tasks"),
        _ => (5, method.card().choose_when),
    };
    (merit, why.to_owned())
}
