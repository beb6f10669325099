//! Steps of training, end to end: data parallel, and the same model alone on each rank at the same time. And
//! tensor-parallel layers, beside the same work without collectives and beside those collectives alone.

use std::time::Instant;

use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed as dist;

use dist::ProcessGroup;
use dist::data_parallel::{DdpOptions, DistributedDataParallel};
use dist::model_parallel::tensor::{Activation, ParallelLinearConfig, ParallelMlp};

/// What is trained.
pub(crate) const MODELS: [&str; 3] = ["mlp_25m", "gpt_10m", TENSOR_PARALLEL];

/// The feed-forward part of a transformer block, split over the ranks: forward and backward, one all_reduce each.
pub(crate) const TENSOR_PARALLEL: &str = "tp_mlp";

/// Tokens, width and hidden features of the layers.
const LAYERS: [i64; 3] = [512, 1024, 4096];

/// How the ranks work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// Together.
    Parallel,
    /// Each as much as in parallel, but for itself.
    Alone,
    /// Nothing but the collectives of tensor-parallel layers.
    Exchange,
}

impl Mode {
    pub(crate) const ALL: [Self; 3] = [Self::Parallel, Self::Alone, Self::Exchange];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Parallel => "parallel",
            Self::Alone => "alone",
            Self::Exchange => "exchange",
        }
    }
}

/// A model in training, parallel or alone.
pub(crate) struct Training {
    name: String,
    mode: Mode,
    vs: nn::VarStore,
    model: Model,
    optimizer: nn::Optimizer,
    input: Tensor,
    target: Tensor,
    /// The sum of the last output.
    output: f64,
}

enum Model {
    /// Nothing to compute.
    None,
    Alone(Box<dyn Module + Send>),
    Parallel(DistributedDataParallel<Box<dyn Module + Send>>),
}

type Failure = Box<dyn std::error::Error>;

impl Training {
    pub(crate) fn new(name: &str, mode: Mode, group: &ProcessGroup) -> Result<Self, Failure> {
        let layers = name == TENSOR_PARALLEL;
        tch::manual_seed(if layers { 0 } else { group.rank() as i64 });
        let vs = nn::VarStore::new(Device::Cpu);
        let (net, input, target): (Box<dyn Module + Send>, _, _) = match name {
            "mlp_25m" => {
                let float = (Kind::Float, Device::Cpu);
                (Box::new(mlp(&vs.root())), Tensor::randn([32, 1024], float), Tensor::randn([32, 512], float))
            }
            "gpt_10m" => {
                let tokens = || Tensor::randint(4096, [4, 128], (Kind::Int64, Device::Cpu));
                (Box::new(gpt(&vs.root())), tokens(), tokens())
            }
            TENSOR_PARALLEL => {
                let [tokens, width, _] = LAYERS;
                let random = || Tensor::randn([tokens, width], (Kind::Float, Device::Cpu));
                (layers_of(&vs.root(), mode, group)?, random().set_requires_grad(true), random())
            }
            _ => return Err(format!("no model {name:?}").into()),
        };
        let optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
        let model = match mode {
            Mode::Parallel if !layers => {
                Model::Parallel(DistributedDataParallel::new(net, &vs, group, DdpOptions::new())?)
            }
            Mode::Exchange => Model::None,
            _ => Model::Alone(net),
        };
        Ok(Self { name: name.to_owned(), mode, vs, model, optimizer, input, target, output: 0.0 })
    }

    pub(crate) fn is(&self, name: &str, mode: Mode) -> bool {
        self.name == name && self.mode == mode
    }

    /// One step, in nanoseconds.
    pub(crate) fn step(&mut self, group: &ProcessGroup) -> Result<u128, Failure> {
        group.barrier()?;
        let start = Instant::now();
        self.optimizer.zero_grad();
        let output = match &self.model {
            Model::None => {
                for _ in 0..2 {
                    let mut gradient = self.target.shallow_clone();
                    group.all_reduce(&mut gradient, dist::ReduceOp::Avg)?;
                }
                return Ok(start.elapsed().as_nanos());
            }
            Model::Alone(model) => model.forward(&self.input),
            Model::Parallel(model) => model.forward_with(|model| model.forward(&self.input))?,
        };
        let loss = match self.target.kind() {
            Kind::Int64 => output.view([-1, 4096]).cross_entropy_for_logits(&self.target.view([-1])),
            _ => output.mse_loss(&self.target, Reduction::Mean),
        };
        match &self.model {
            Model::None | Model::Alone(_) => dist::autograd::backward(&loss)?,
            Model::Parallel(model) => model.backward(&loss)?,
        }
        if self.name != TENSOR_PARALLEL {
            self.optimizer.step();
        }
        let nanos = start.elapsed().as_nanos();
        self.input.zero_grad();
        self.output = output.detach().sum(Kind::Double).double_value(&[]);
        Ok(nanos)
    }

    /// Whether all ranks have the same parameters, as they must when they train together.
    pub(crate) fn agrees(&self, group: &ProcessGroup) -> Result<bool, Failure> {
        let sums: Vec<Tensor> =
            self.vs.trainable_variables().iter().map(|v| v.detach().sum(Kind::Double)).collect();
        let sums = match self.name.as_str() {
            TENSOR_PARALLEL => Tensor::from_slice(&[self.output]),
            _ => Tensor::stack(&sums, 0),
        };
        let all = group.all_gather_uneven(&sums)?;
        Ok(self.mode != Mode::Parallel || all.iter().all(|other| other.equal(&all[0])))
    }

    /// The bytes that are exchanged in a step: the parameters, or the activations and their gradient.
    pub(crate) fn bytes(&self) -> usize {
        if self.name == TENSOR_PARALLEL {
            return (2 * 4 * LAYERS[0] * LAYERS[1]) as usize;
        }
        self.vs.trainable_variables().iter().map(|v| v.numel() * v.kind().elt_size_in_bytes()).sum()
    }
}

/// Tensor-parallel layers, or layers of the same size as one rank's part of them.
fn layers_of(p: &nn::Path<'_>, mode: Mode, group: &ProcessGroup) -> Result<Box<dyn Module + Send>, Failure> {
    let [_, width, hidden] = LAYERS;
    if mode == Mode::Parallel {
        let config = ParallelLinearConfig::default();
        return Ok(Box::new(ParallelMlp::new(p, width, hidden, Activation::Gelu, config, group)?));
    }
    let linear = |name: &str, from, to| nn::linear(p / name, from, to, nn::LinearConfig::default());
    let part = hidden / group.size() as i64;
    Ok(Box::new(
        nn::seq().add(linear("up", width, part)).add_fn(|x| x.gelu("none")).add(linear("down", part, width)),
    ))
}

fn mlp(p: &nn::Path<'_>) -> impl Module + use<> {
    let linear = |name: &str, from, to| nn::linear(p / name, from, to, nn::LinearConfig::default());
    nn::seq()
        .add(linear("a", 1024, 2048))
        .add_fn(Tensor::relu)
        .add(linear("b", 2048, 4096))
        .add_fn(Tensor::relu)
        .add(linear("c", 4096, 3072))
        .add_fn(Tensor::relu)
        .add(linear("d", 3072, 512))
}

#[derive(Debug)]
struct Block {
    heads: i64,
    norms: [nn::LayerNorm; 2],
    qkv: nn::Linear,
    out: nn::Linear,
    up: nn::Linear,
    down: nn::Linear,
}

impl Block {
    fn new(p: &nn::Path<'_>, width: i64, heads: i64) -> Self {
        let linear = |name: &str, from, to| nn::linear(p / name, from, to, nn::LinearConfig::default());
        let norm = |name: &str| nn::layer_norm(p / name, vec![width], nn::LayerNormConfig::default());
        Self {
            heads,
            norms: [norm("n1"), norm("n2")],
            qkv: linear("qkv", width, 3 * width),
            out: linear("out", width, width),
            up: linear("up", width, 4 * width),
            down: linear("down", 4 * width, width),
        }
    }
}

impl Module for Block {
    fn forward(&self, x: &Tensor) -> Tensor {
        let (batch, time, width) = x.size3().unwrap_or_default();
        let heads = |t: &Tensor| t.view([batch, time, self.heads, width / self.heads]).transpose(1, 2);
        let qkv = self.qkv.forward(&self.norms[0].forward(x)).split(width, 2);
        let attention = Tensor::scaled_dot_product_attention(
            &heads(&qkv[0]),
            &heads(&qkv[1]),
            &heads(&qkv[2]),
            None::<Tensor>,
            0.0,
            true,
            None,
            false,
        );
        let attended = attention.transpose(1, 2).contiguous().view([batch, time, width]);
        let x = x + self.out.forward(&attended);
        &x + self.down.forward(&self.up.forward(&self.norms[1].forward(&x)).gelu("none"))
    }
}

#[derive(Debug)]
struct Gpt {
    tokens: nn::Embedding,
    places: nn::Embedding,
    blocks: Vec<Block>,
    norm: nn::LayerNorm,
    head: nn::Linear,
}

fn gpt(p: &nn::Path<'_>) -> Gpt {
    let (vocabulary, time, width) = (4096, 128, 320);
    let embedding = |name: &str, n| nn::embedding(p / name, n, width, nn::EmbeddingConfig::default());
    let head = nn::LinearConfig { bias: false, ..Default::default() };
    Gpt {
        tokens: embedding("tokens", vocabulary),
        places: embedding("places", time),
        blocks: (0..6).map(|n| Block::new(&(p / n), width, 5)).collect(),
        norm: nn::layer_norm(p / "norm", vec![width], nn::LayerNormConfig::default()),
        head: nn::linear(p / "head", width, vocabulary, head),
    }
}

impl Module for Gpt {
    fn forward(&self, tokens: &Tensor) -> Tensor {
        let time = tokens.size().get(1).copied().unwrap_or_default();
        let places = self.places.forward(&Tensor::arange(time, (Kind::Int64, Device::Cpu)));
        let x = self.blocks.iter().fold(self.tokens.forward(tokens) + places, |x, b| b.forward(&x));
        self.head.forward(&self.norm.forward(&x))
    }
}
