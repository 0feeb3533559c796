//! The adapters that an X-LoRA adapter is made of.

use super::{Problem, Service, catalogue::Model};
use crate::{
    domain::{XloraSpec, spec::XloraExpert},
    inference::read_adapter,
    methods::xlora,
};

impl Service {
    /// Fills in what the named adapters are: tuned models of the same base whose change is low-rank.
    pub(super) async fn find_experts(&self, project: &str, on: &Model, spec: &mut XloraSpec) -> Result<(), Problem> {
        let base = &on.resident.base.info;
        for (i, name) in spec.adapters.iter().enumerate() {
            let param = format!("adapter.adapters[{i}]");
            let model = self.model(project, name).await.map_err(|problem| problem.at(&param))?;
            let Some(record) = model.adapter else {
                let message = format!("{name} is a base: experts are tuned models");
                return Err(Problem::invalid(&param, "not_an_adapter", message));
            };
            if record.parent != base.id {
                let message = format!("{name} was tuned on {}, not on {}", record.parent, base.id);
                return Err(Problem::invalid(&param, "adapter_of_another_base", message));
            }
            let (_, files) = read_adapter(&self.store, &record.generation).await?;
            let (lora, _) = xlora::expert(&files, base).map_err(|error| Problem::from(error).at(&param))?;
            spec.experts.push(XloraExpert { generation: Some(record.generation), lora });
        }
        Ok(())
    }
}
