//! AdaLoRA while it is trained.

use std::{collections::BTreeMap, sync::Arc};

use candle_core::{Tensor, Var};

use super::{
    Module, change, config,
    importance::{Sensitivity, kept, scores},
    layer::AdaLora,
    shapes, triplets,
};
use crate::{
    domain::{AdaLoraSpec, BaseInfo, spec::Budget},
    methods::{AdapterFiles, MethodError, Named, Stepped, Trainable, file, variables},
    model::Hook,
};

/// How far the ranks are decided.
pub enum Ranks {
    /// Not yet: the statistics of each variable.
    Open(Vec<Sensitivity>),
    /// By this run: which triplets of each module stay. The others are there still, with a value of zero.
    Settled(Vec<Vec<bool>>),
    /// By the files that it began with: their `rank_pattern`, and the others are gone.
    Given(Option<Vec<Vec<bool>>>),
}

impl Ranks {
    pub fn open(variables: &[(String, Var)]) -> Self {
        Ranks::Open(variables.iter().map(|(_, variable)| Sensitivity::new(variable.elem_count())).collect())
    }
}

pub struct Training {
    spec: AdaLoraSpec,
    base: BaseInfo,
    budget: Budget,
    modules: Vec<Module>,
    /// A, E and B of each module that has any rank.
    variables: Vec<(String, Var)>,
    ranks: Ranks,
}

impl Training {
    /// `tensors` are A, E and B of each module.
    pub fn new(
        spec: &AdaLoraSpec,
        base: &BaseInfo,
        budget: Budget,
        modules: Vec<Module>,
        tensors: &[Tensor],
        ranks: impl FnOnce(&[(String, Var)]) -> Ranks,
    ) -> Result<Self, MethodError> {
        let (shapes, tensors): (Vec<_>, Vec<Tensor>) =
            shapes(&modules, base).into_iter().zip(tensors.iter().cloned()).filter(|(_, t)| t.elem_count() > 0).unzip();
        let variables = variables::of(&tensors, &shapes)?;
        let ranks = ranks(&variables);
        Ok(Self { spec: spec.clone(), base: base.clone(), budget, modules, variables, ranks })
    }

    /// The modules that have any rank; their variables stand in threes.
    fn present(&self) -> Vec<Module> {
        self.modules.iter().copied().filter(|module| module.r > 0).collect()
    }

    /// The singular values of each of them.
    fn values(&self) -> impl Iterator<Item = &Var> {
        self.variables.chunks_exact(3).map(|three| &three[1].1)
    }

    /// Zeroes the singular values of pruned triplets.
    fn mask(&self, kept: &[Vec<bool>]) -> Result<(), MethodError> {
        for (variable, kept) in self.values().zip(kept) {
            let values = variable.flatten_all()?.to_vec1::<f32>()?;
            let masked: Vec<f32> = values.iter().zip(kept).map(|(e, kept)| if *kept { *e } else { 0.0 }).collect();
            variable.set(&Tensor::from_vec(masked, variable.shape(), variable.device())?)?;
        }
        Ok(())
    }

    /// Which triplets stay after a step that prunes.
    fn allocate(&self, statistics: &[Sensitivity], step: u64) -> Vec<Vec<bool>> {
        let r = self.spec.init_r;
        let scores: Vec<Vec<f32>> = statistics.chunks_exact(3).map(|s| scores([&s[0], &s[1], &s[2]], r)).collect();
        let (first, last) = (r * self.modules.len(), self.spec.target_r * self.modules.len());
        kept(&scores, self.budget.left(step, first, last))
    }

    /// Triplets left, a mean over the modules.
    fn mean_rank(&self) -> Result<f64, candle_core::Error> {
        let mut left = 0;
        for variable in self.values() {
            left += variable.flatten_all()?.to_vec1::<f32>()?.iter().filter(|e| **e != 0.0).count();
        }
        Ok(left as f64 / self.modules.len() as f64)
    }
}

impl Trainable for Training {
    fn hook(&self, _: Option<u64>) -> Result<Arc<dyn Hook>, candle_core::Error> {
        let tensors: Vec<Tensor> = self.variables.iter().map(|(_, variable)| variable.as_tensor().clone()).collect();
        let triplets: Vec<_> = tensors.chunks_exact(3).map(triplets).collect();
        let change = change(&self.spec, &self.base, &self.present(), &triplets)?;
        let (modules, orth_reg_weight) = (self.modules.len(), self.spec.orth_reg_weight);
        Ok(Arc::new(AdaLora { change, triplets, modules, orth_reg_weight, mean_rank: self.mean_rank()? }))
    }

    fn variables(&self) -> Vec<(String, Var)> {
        self.variables.clone()
    }

    fn stepped(&mut self, stepped: &Stepped) -> Result<(), MethodError> {
        let step = stepped.step;
        if step < self.budget.last()
            && let Ranks::Open(statistics) = &mut self.ranks
        {
            let (beta1, beta2) = (self.spec.beta1, self.spec.beta2);
            for ((statistics, (_, variable)), gradient) in
                statistics.iter_mut().zip(&self.variables).zip(stepped.gradients)
            {
                statistics.update(&variable.flatten_all()?.to_vec1::<f32>()?, gradient, beta1, beta2);
            }
        }
        match &self.ranks {
            Ranks::Open(statistics) if self.budget.prunes_after(step) => {
                let kept = self.allocate(statistics, step);
                self.mask(&kept)?;
                if step == self.budget.last() {
                    self.ranks = Ranks::Settled(kept);
                }
                Ok(())
            }
            Ranks::Settled(kept) => self.mask(kept),
            _ => Ok(()),
        }
    }

    fn state(&self) -> Vec<Named> {
        match &self.ranks {
            Ranks::Open(statistics) => {
                let named = self.variables.iter().zip(statistics).flat_map(|((name, variable), statistics)| {
                    let shape = variable.dims().to_vec();
                    [
                        (format!("{IMPORTANCE}{name}"), shape.clone(), statistics.mean.clone()),
                        (format!("{UNCERTAINTY}{name}"), shape, statistics.uncertainty.clone()),
                    ]
                });
                named.collect()
            }
            Ranks::Settled(kept) => {
                let named = self.modules.iter().zip(kept).map(|(module, kept)| {
                    let flags = kept.iter().map(|kept| f32::from(u8::from(*kept))).collect();
                    (format!("{KEPT}{}", module.key()), vec![kept.len()], flags)
                });
                named.collect()
            }
            Ranks::Given(_) => Vec::new(),
        }
    }

    fn restore(&mut self, state: Vec<Named>) -> Result<(), MethodError> {
        let is_settled = state.iter().any(|(name, ..)| name.starts_with(KEPT));
        let mut state: BTreeMap<String, (Vec<usize>, Vec<f32>)> =
            state.into_iter().map(|(name, shape, values)| (name, (shape, values))).collect();
        let mut take = |name: String, shape: &[usize]| match state.remove(&name) {
            Some((found, values)) if found == shape => Ok(values),
            Some((found, _)) => Err(MethodError::Mismatch(format!("{name} has shape {found:?}, not {shape:?}"))),
            None => Err(MethodError::Mismatch(format!("the method's state has no {name}"))),
        };
        let restored = match &self.ranks {
            Ranks::Given(kept) => Ranks::Given(kept.clone()),
            _ if is_settled => {
                let flags = self.modules.iter().map(|module| {
                    let values = take(format!("{KEPT}{}", module.key()), &[module.r])?;
                    Ok(values.into_iter().map(|flag| flag != 0.0).collect())
                });
                Ranks::Settled(flags.collect::<Result<_, MethodError>>()?)
            }
            _ => {
                let statistics = self.variables.iter().map(|(name, variable)| {
                    let mean = take(format!("{IMPORTANCE}{name}"), variable.dims())?;
                    let uncertainty = take(format!("{UNCERTAINTY}{name}"), variable.dims())?;
                    Ok(Sensitivity { mean, uncertainty })
                });
                Ranks::Open(statistics.collect::<Result<_, MethodError>>()?)
            }
        };
        if let Some(name) = state.keys().next() {
            return Err(MethodError::Mismatch(format!("the method keeps no {name}")));
        }
        self.ranks = restored;
        Ok(())
    }

    fn export(&self) -> Result<AdapterFiles, MethodError> {
        let kept = match &self.ranks {
            Ranks::Open(_) => None,
            Ranks::Settled(kept) => Some(kept),
            Ranks::Given(kept) => kept.as_ref(),
        };
        let mut tensors = variables::named(&self.variables)?;
        if let Ranks::Settled(kept) = &self.ranks {
            tensors.chunks_exact_mut(3).zip(kept).for_each(|(three, kept)| prune(three, kept));
        }
        // Modules without rank stand in the file as well, with tensors of no numbers.
        let mut present = tensors.into_iter();
        let all = shapes(&self.modules, &self.base).into_iter().filter_map(|(name, shape)| match shape.contains(&0) {
            true => Some((name, shape, Vec::new())),
            false => present.next(),
        });
        let weights = file::tensor_bytes(&all.collect::<Vec<_>>());
        let kept = kept.map(|kept| self.modules.iter().zip(kept.iter().map(Vec::as_slice)).collect());
        let config = file::config_bytes(&config::write(&self.spec, &self.base, &self.budget, kept));
        Ok(AdapterFiles { config, weights })
    }
}

const IMPORTANCE: &str = "importance.";
const UNCERTAINTY: &str = "uncertainty.";
const KEPT: &str = "kept.";

/// Takes pruned rows out of A and E, and columns out of B.
fn prune(three: &mut [Named], kept: &[bool]) {
    let left = kept.iter().filter(|kept| **kept).count();
    for (place, (_, shape, values)) in three.iter_mut().enumerate() {
        let (axis, width) = if place == 2 { (1, 1) } else { (0, shape[1]) };
        let parts = values.chunks(width).zip(kept.iter().cycle()).filter(|(_, kept)| **kept);
        *values = parts.flat_map(|(part, _)| part.iter().copied()).collect();
        shape[axis] = left;
    }
}
