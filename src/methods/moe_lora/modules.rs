//! A mixture's tensors, put in their places.

use std::sync::Arc;

use candle_core::{Result, Tensor};

use super::{
    adamole::Threshold,
    balance::Tally,
    experts::Experts,
    linears::{Linears, Mixed, Sites},
    loramoe::All,
    mixlora::{Block, MixLora},
    names,
    router::{Gate, Router},
    serving,
    top_k::TopK,
};
use crate::{
    domain::{
        BaseInfo, MoeLoraSpec, Site,
        spec::{MoeVariant, is_feed_forward},
    },
    methods::{
        lora::layer::{Adapted, LowRank},
        part::Tensors,
    },
    model::{Base, Hook},
};

/// The tensors in their places; while training they share their memory with the variables.
pub struct Modules {
    placed: Placed,
    dropout: f64,
    coefficient: f64,
}

enum Placed {
    Blocks { blocks: Arc<Vec<Option<Block>>>, attention: Arc<Adapted<LowRank>>, top_k: usize },
    Linears(Arc<Sites>),
}

impl Modules {
    pub fn new(spec: &MoeLoraSpec, base: &BaseInfo, tensors: &Tensors) -> Result<Self> {
        let reader = Reader { spec, base, tensors };
        let sites = spec.targets(base).map_err(candle_core::Error::wrap)?;
        let placed = match spec.variant {
            MoeVariant::MixLora => reader.blocks(&sites)?,
            _ => reader.linears(&sites)?,
        };
        let coefficient = spec.router_aux_loss_coef.or(spec.blc_weight).unwrap_or_default();
        Ok(Self { placed, dropout: spec.lora_dropout, coefficient })
    }

    /// The hook of one pass, with a tally of its own.
    pub fn training(&self) -> Arc<dyn Hook> {
        self.hook(Some(Tally::new(self.coefficient)))
    }

    pub fn serving(&self, base: &Base) -> Result<Arc<dyn Hook>> {
        match &self.placed {
            // Elsewhere than on the CPU, its ops are candle's.
            Placed::Blocks { blocks, attention, top_k } if base.is_fused() => {
                Ok(Arc::new(serving::of(blocks, attention, *top_k, base)?))
            }
            _ => Ok(self.hook(None)),
        }
    }

    fn hook(&self, tally: Option<Tally>) -> Arc<dyn Hook> {
        let dropout = self.dropout;
        match &self.placed {
            Placed::Linears(sites) => Arc::new(Linears { sites: sites.clone(), dropout, tally }),
            Placed::Blocks { blocks, attention, .. } => {
                Arc::new(MixLora { blocks: blocks.clone(), attention: attention.clone(), dropout, tally })
            }
        }
    }
}

/// Puts named tensors where they belong.
struct Reader<'a> {
    spec: &'a MoeLoraSpec,
    base: &'a BaseInfo,
    tensors: &'a Tensors,
}

impl Reader<'_> {
    fn pair(&self, holder: &str) -> Result<(Tensor, Tensor)> {
        Ok((
            self.tensors.get(&format!("{holder}.lora_A.weight"))?,
            self.tensors.get(&format!("{holder}.lora_B.weight"))?,
        ))
    }

    fn scale(&self) -> f64 {
        self.spec.lora_alpha / self.spec.r as f64
    }

    fn top_k(&self) -> usize {
        self.spec.top_k.unwrap_or(2)
    }

    fn experts(&self, layer: usize, site: Site) -> Result<Experts> {
        let module = names::module(self.spec, layer, site);
        let experts = 0..self.spec.experts(layer, self.base);
        let pairs = experts.map(|e| self.pair(&names::expert(&module, e))).collect::<Result<_>>()?;
        Ok(Experts { pairs, scale: self.scale() })
    }

    fn router(&self, module: &str, place: usize) -> Result<Router> {
        let gate: Box<dyn Gate> = match self.spec.variant {
            MoeVariant::MixLora | MoeVariant::Mola => Box::new(TopK(self.top_k())),
            MoeVariant::LoraMoe => Box::new(All),
            MoeVariant::AdaMole => Box::new(Threshold {
                weight: self.tensors.get(&format!("{module}.moe_threshold.weight"))?,
                bias: self.tensors.get(&format!("{module}.moe_threshold.bias"))?,
                max: self.spec.max_threshold.unwrap_or_default(),
            }),
        };
        let weight = self.tensors.get(&format!("{module}.moe_gate.weight"))?;
        Ok(Router { weight, gate, jitter: self.spec.jitter_noise, place: place as u64 })
    }

    fn linears(&self, targets: &[(usize, Site)]) -> Result<Placed> {
        let mut sites: Sites = (0..self.base.layers).map(|_| Default::default()).collect();
        for (layer, site) in targets {
            let place = layer * Site::LAYER.len() + *site as usize;
            let router = self.router(&names::module(self.spec, *layer, *site), place)?;
            sites[*layer][*site as usize] = Some(Mixed { router, experts: self.experts(*layer, *site)? });
        }
        Ok(Placed::Linears(Arc::new(sites)))
    }

    fn blocks(&self, targets: &[(usize, Site)]) -> Result<Placed> {
        let mut attention = Adapted::new(self.base.layers, self.spec.lora_dropout);
        for (layer, site) in targets.iter().filter(|(_, site)| !is_feed_forward(*site)) {
            let (a, b) = self.pair(&names::module(self.spec, *layer, *site))?;
            attention.insert(*layer, *site, LowRank { a, b, scale: self.scale() });
        }
        let mut blocks: Vec<Option<Block>> = (0..self.base.layers).map(|_| None).collect();
        for layer in self.spec.blocks(targets) {
            let experts = |site| targets.contains(&(layer, site)).then(|| self.experts(layer, site)).transpose();
            blocks[layer] = Some(Block {
                router: self.router(&names::block(layer), layer)?,
                gate: experts(Site::Gate)?,
                up: experts(Site::Up)?,
                down: experts(Site::Down)?,
            });
        }
        let (blocks, attention) = (Arc::new(blocks), Arc::new(attention));
        Ok(Placed::Blocks { blocks, attention, top_k: self.top_k() })
    }
}
