//! The words of the project: plain types without I/O and without tensors.

pub mod adapter;
pub mod alias;
pub mod base;
pub mod batch;
pub mod dataset;
pub mod estimate;
pub mod event;
pub mod feedback;
pub mod file;
pub mod head;
pub mod id;
pub mod job;
pub mod key;
pub mod labelling;
pub mod observer;
pub mod rng;
pub mod rollout;
pub mod spec;
pub mod upload;

pub use adapter::{AdapterRecord, Manifest, ManifestFile};
pub use alias::{AliasRecord, Expected};
pub use base::{BaseInfo, Norm, Site};
pub use batch::{BatchError, BatchLine, BatchRecord, BatchStatus, Endpoint};
pub use dataset::{FileReport, LineError};
pub use estimate::{MemoryEstimate, RunEstimate, Saving};
pub use event::{Event, EventKind, Metrics};
pub use feedback::{Feedback, StoredCompletion};
pub use file::FileRecord;
pub use head::{TaskHead, WordToken};
pub use job::{Failure, Job, JobStatus};
pub use key::{ApiKey, Caller, Scope};
pub use labelling::{
    AnswerSampling, Dropped, LabelReport, LabelSpec, LabelUsage, Labelled, Labelling, Outcome, PairJudge,
};
pub use observer::{Control, Live, Observer, Snapshot};
pub use rollout::Completion;
pub use spec::{
    AdaLoraSpec, DoraSpec, FullSpec, Hyperparameters, Ia3Spec, LoraSpec, MethodSpec, MoeLoraSpec, ObjectiveSpec,
    PTuningSpec, PTuningV2Spec, PrefixTuningSpec, PromptTuningSpec, SpecError, TrainSpec, Training, TrainingRequest,
    UnipeltSpec, XloraSpec,
};
