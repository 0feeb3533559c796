//! One integration binary: all of it links once.

mod adalora;
mod adapterhub;
mod api;
mod architecture;
mod artifact;
mod batches;
mod crash;
mod data;
mod db;
mod device;
mod dora;
mod ends;
mod estimate;
mod experts;
mod formats;
mod full;
mod golden;
mod heads;
mod ia3;
mod inference;
mod logits;
mod merge;
mod methods;
mod model;
mod openapi;
mod outbound;
mod peft;
mod pissa;
mod ppo;
mod preference;
mod quantised;
mod reinforcement;
mod sdk;
mod soft_labels;
mod storage;
mod support;
mod tape;
mod text;
mod tiers;
mod trainer;
mod virtual_tokens;
mod xlora;

/// Tests of memory ask it.
#[global_allocator]
static ALLOCATOR: support::counting::Counting = support::counting::Counting;
