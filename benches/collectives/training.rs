//! Steps of training, end to end: data parallel, and the same model alone on each rank at the same time.

use std::time::Instant;

use tch::nn::{self, Module, OptimizerConfig};
use tch::{Device, Kind, Reduction, Tensor};
use tch_distributed as dist;

use dist::ProcessGroup;
use dist::data_parallel::{DdpOptions, DistributedDataParallel};

/// What is trained, with the bytes of its parameters.
pub(crate) const MODELS: [&str; 2] = ["mlp_25m", "gpt_10m"];

/// A model in training, parallel or alone.
pub(crate) struct Training {
    name: String,
    parallel: bool,
    vs: nn::VarStore,
    model: Model,
    optimizer: nn::Optimizer,
    input: Tensor,
    target: Tensor,
}

enum Model {
    Alone(Box<dyn Module + Send>),
    Parallel(DistributedDataParallel<Box<dyn Module + Send>>),
}

type Failure = Box<dyn std::error::Error>;

impl Training {
    pub(crate) fn new(name: &str, parallel: bool, group: &ProcessGroup) -> Result<Self, Failure> {
        tch::manual_seed(group.rank() as i64);
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
            _ => return Err(format!("no model {name:?}").into()),
        };
        let optimizer = nn::Sgd::default().build(&vs, 1e-3)?;
        let model = match parallel {
            true => Model::Parallel(DistributedDataParallel::new(net, &vs, group, DdpOptions::new())?),
            false => Model::Alone(net),
        };
        Ok(Self { name: name.to_owned(), parallel, vs, model, optimizer, input, target })
    }

    pub(crate) fn is(&self, name: &str, parallel: bool) -> bool {
        self.name == name && self.parallel == parallel
    }

    /// One step, in nanoseconds.
    pub(crate) fn step(&mut self, group: &ProcessGroup) -> Result<u128, Failure> {
        group.barrier()?;
        let start = Instant::now();
        self.optimizer.zero_grad();
        let output = match &self.model {
            Model::Alone(model) => model.forward(&self.input),
            Model::Parallel(model) => model.forward_with(|model| model.forward(&self.input))?,
        };
        let loss = match self.target.kind() {
            Kind::Int64 => output.view([-1, 4096]).cross_entropy_for_logits(&self.target.view([-1])),
            _ => output.mse_loss(&self.target, Reduction::Mean),
        };
        match &self.model {
            Model::Alone(_) => dist::autograd::backward(&loss)?,
            Model::Parallel(model) => model.backward(&loss)?,
        }
        self.optimizer.step();
        Ok(start.elapsed().as_nanos())
    }

    /// Whether all ranks have the same parameters, as they must when they train together.
    pub(crate) fn agrees(&self, group: &ProcessGroup) -> Result<bool, Failure> {
        let sums: Vec<Tensor> =
            self.vs.trainable_variables().iter().map(|v| v.detach().sum(Kind::Double)).collect();
        let sums = Tensor::stack(&sums, 0);
        let all = group.all_gather_uneven(&sums)?;
        Ok(!self.parallel || all.iter().all(|other| other.equal(&all[0])))
    }

    /// The bytes of the parameters.
    pub(crate) fn bytes(&self) -> usize {
        self.vs.trainable_variables().iter().map(|v| v.numel() * v.kind().elt_size_in_bytes()).sum()
    }
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
