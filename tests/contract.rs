//! The public contract: every name below, with its arguments and its result, is what programs outside this crate
//! are written against. A change that breaks this file breaks them.

use std::sync::Arc;
use std::time::Duration;

use dist::autograd::{self, Context, Function, HookHandle};
use dist::backend::{BackendContext, BackendFactory, CollectiveBackend};
use dist::data_parallel::{DdpOptions, DistributedDataParallel, DistributedSampler, hooks};
use dist::model_parallel::tensor::{
    ColumnParallelLinear, ParallelLinearConfig, RowParallelLinear, VocabParallelEmbedding,
    vocab_parallel_cross_entropy,
};
use dist::model_parallel::{
    DeviceMesh,
    pipeline::{Pipeline, Schedule, Stage},
};
use dist::store::{FileStore, HashStore, PrefixStore, Store, TcpStore};
use dist::{
    Backend, BackendSpec, Error, GroupOptions, InitOptions, P2pOp, ProcessGroup, ReduceOp, Result, Work,
    functional,
};
use tch::nn::{Module, OptimizerConfig};
use tch::{Device, Kind, Tensor, nn};
use tch_distributed as dist;

type Object = Vec<(u8, String)>;

/// Compiled, never called: the types are what is asserted.
#[allow(dead_code, clippy::too_many_lines)]
mod signatures {
    use super::*;

    fn send<T: Send + Sync + 'static>() {}

    fn types() {
        send::<ProcessGroup>();
        send::<Error>();
        fn work<T: Send + Unpin + Future<Output = Result<()>> + 'static>() {}
        work::<Work>();
        fn group<T: Clone + std::fmt::Debug + std::fmt::Display>() {}
        group::<ProcessGroup>();
        fn store<T: Store>() {}
        store::<Arc<dyn Store>>();
        store::<TcpStore>();
        store::<FileStore>();
        store::<HashStore>();
        store::<PrefixStore<HashStore>>();
    }

    fn world() -> Result<()> {
        let options = InitOptions::new()
            .init_method("tcp://host:1")
            .store(HashStore::new())
            .rank(0)
            .world_size(1)
            .timeout(Duration::from_secs(1))
            .device(Device::Cpu)
            .group_name("world");
        let _: BackendSpec = String::from("cpu:native,cuda:nccl").into();
        let _: [BackendSpec; 4] =
            [Backend::Auto, Backend::Native, Backend::Gloo, Backend::Nccl].map(Into::into);
        let _: BackendSpec = BackendSpec::default();
        let _: ProcessGroup = dist::init_process_group("native", options)?;
        let _: ProcessGroup = dist::init_process_group(Backend::Auto, InitOptions::default())?;
        dist::destroy_process_group()?;
        let _: bool = dist::is_initialized();
        let _: ProcessGroup = dist::world()?;
        let _: [usize; 3] = [dist::rank()?, dist::world_size()?, dist::local_rank()?];
        let _: String = dist::backend_name()?;
        let _: bool = dist::is_backend_available("gloo");
        dist::register_backend("mine", dist::backend::native::create)?;
        dist::register_backend("other", |context: BackendContext| -> Result<Arc<dyn CollectiveBackend>> {
            let BackendContext { store: _, rank: _, size: _, ranks: _, timeout: _, group_name: _, .. } =
                &context;
            dist::backend::native::create(context)
        })?;
        let options =
            GroupOptions::new().backend("gloo").timeout(Duration::ZERO).group_name("g").keep_order(true);
        let _: Option<ProcessGroup> = dist::new_group(&[0])?;
        let _: Option<ProcessGroup> = dist::new_group_with(&[0], options)?;
        let _: (ProcessGroup, Vec<Vec<usize>>) = dist::new_subgroups(1)?;
        let _: Option<ProcessGroup> = dist::new_subgroups_by_enumeration(&[vec![0]])?;
        Ok(())
    }

    fn factory(factory: impl BackendFactory, context: BackendContext) -> Result<Arc<dyn CollectiveBackend>> {
        factory.create(context)
    }

    fn group(g: &ProcessGroup, t: &mut Tensor, u: &Tensor, ts: &mut [Tensor], us: &[Tensor]) -> Result<()> {
        let second = Duration::from_secs(1);
        let _: [usize; 2] = [g.rank(), g.size()];
        let _: &[usize] = g.ranks();
        let _: Option<usize> = g.group_rank(0);
        let _: (&str, String, Duration) = (g.name(), g.backend_name(), g.timeout());
        g.set_timeout(second);
        let g: ProcessGroup = g.with_timeout(second);
        g.all_reduce(t, ReduceOp::Sum)?;
        g.reduce(t, 0, ReduceOp::Avg)?;
        g.broadcast(t, 0)?;
        g.all_gather(ts, u)?;
        let _: Vec<Tensor> = g.all_gather_uneven(u)?;
        g.all_gather_into_tensor(t, u)?;
        g.gather(Some(&mut *ts), u, 0)?;
        g.scatter(t, Some(us), 0)?;
        g.reduce_scatter(t, us, ReduceOp::Product)?;
        g.reduce_scatter_tensor(t, u, ReduceOp::PremulSum(0.5))?;
        g.all_to_all(ts, us)?;
        g.all_to_all_single(t, u, Some(&[1i64]), None)?;
        g.barrier()?;
        g.monitored_barrier(second, true)?;
        g.send(u, 0, 7)?;
        let _: usize = g.recv(t, 0, 7)?;
        let _: usize = g.recv(t, None, 7)?;
        let _: Vec<Work> = g.batch_isend_irecv(vec![P2pOp::send(u, 0, 0), P2pOp::recv(t, 0, 0)])?;
        g.all_reduce_coalesced(ts, ReduceOp::Min)?;
        let _: Object = g.broadcast_object(Some(Object::new()), 0)?;
        let _: Vec<Object> = g.all_gather_object(&Object::new())?;
        let _: Option<Vec<Object>> = g.gather_object(&Object::new(), 0)?;
        let _: Object = g.scatter_object(Some(vec![Object::new()]), 0)?;
        g.send_object(&Object::new(), 0, 0)?;
        let _: (usize, Object) = g.recv_object(None, 0)?;
        let _: Option<ProcessGroup> = g.new_group(&[0])?;
        let _: Option<ProcessGroup> = g.split(Some(-1), 0)?;
        g.abort()
    }

    fn asynchronous(g: &ProcessGroup, t: &Tensor, ts: &[Tensor]) -> Result<()> {
        let works: Vec<Work> = vec![
            g.all_reduce_async(t, ReduceOp::Max)?,
            g.reduce_async(t, 0, ReduceOp::BitAnd)?,
            g.broadcast_async(t, 0)?,
            g.all_gather_async(ts, t)?,
            g.all_gather_into_tensor_async(t, t)?,
            g.gather_async(Some(ts), t, 0)?,
            g.scatter_async(t, Some(ts), 0)?,
            g.reduce_scatter_async(t, ts, ReduceOp::BitOr)?,
            g.reduce_scatter_tensor_async(t, t, ReduceOp::BitXor)?,
            g.all_to_all_async(ts, ts)?,
            g.all_to_all_single_async(t, t, None, Some(&[1i64]))?,
            g.all_reduce_coalesced_async(ts, ReduceOp::Sum)?,
            g.barrier_async()?,
            g.isend(t, 0, 0)?,
            g.irecv(t, None, 0)?,
        ];
        for work in &works {
            work.wait()?;
            let _: bool = work.wait_timeout(Duration::ZERO)?;
            let _: bool = work.is_completed();
            let _: Option<usize> = work.source_rank();
        }
        Ok(())
    }

    /// The same on the default group.
    fn free(t: &mut Tensor, u: &Tensor, ts: &mut [Tensor], us: &[Tensor]) -> Result<()> {
        dist::all_reduce(t, ReduceOp::Sum)?;
        dist::reduce(t, 0, ReduceOp::Sum)?;
        dist::broadcast(t, 0)?;
        dist::all_gather(ts, u)?;
        let _: Vec<Tensor> = dist::all_gather_uneven(u)?;
        dist::all_gather_into_tensor(t, u)?;
        dist::gather(None, u, 0)?;
        dist::scatter(t, None, 0)?;
        dist::reduce_scatter(t, us, ReduceOp::Sum)?;
        dist::reduce_scatter_tensor(t, u, ReduceOp::Sum)?;
        dist::all_to_all(ts, us)?;
        dist::all_to_all_single(t, u, None, None)?;
        dist::barrier()?;
        dist::monitored_barrier(Duration::ZERO, false)?;
        dist::send(u, 0, 0)?;
        let _: usize = dist::recv(t, 0, 0)?;
        let _: Vec<Work> = dist::batch_isend_irecv(vec![])?;
        dist::all_reduce_coalesced(ts, ReduceOp::Sum)?;
        let _: Object = dist::broadcast_object(None, 0)?;
        let _: Vec<Object> = dist::all_gather_object(&Object::new())?;
        let _: Option<Vec<Object>> = dist::gather_object(&Object::new(), 0)?;
        let _: Object = dist::scatter_object(None, 0)?;
        dist::send_object(&Object::new(), 0, 0)?;
        let _: (usize, Object) = dist::recv_object(0, 0)?;
        let _: [Work; 15] = [
            dist::all_reduce_async(t, ReduceOp::Sum)?,
            dist::reduce_async(t, 0, ReduceOp::Sum)?,
            dist::broadcast_async(t, 0)?,
            dist::all_gather_async(ts, u)?,
            dist::all_gather_into_tensor_async(t, u)?,
            dist::gather_async(None, u, 0)?,
            dist::scatter_async(t, None, 0)?,
            dist::reduce_scatter_async(t, us, ReduceOp::Sum)?,
            dist::reduce_scatter_tensor_async(t, u, ReduceOp::Sum)?,
            dist::all_to_all_async(ts, us)?,
            dist::all_to_all_single_async(t, u, None, None)?,
            dist::all_reduce_coalesced_async(us, ReduceOp::Sum)?,
            dist::barrier_async()?,
            dist::isend(u, 0, 0)?,
            dist::irecv(u, 0, 0)?,
        ];
        let _: Option<ProcessGroup> = dist::split(None, 0)?;
        dist::abort()
    }

    /// Every field of every kind of error.
    fn error(error: &Error) {
        let _: &dyn std::error::Error = error;
        match error {
            Error::MissingArgument { argument, builder, variable } => {
                let _: [&'static str; 3] = [argument, builder, variable];
            }
            Error::InvalidArgument { argument, reason } => {
                let _: (&'static str, &String) = (argument, reason);
            }
            Error::RankOutOfRange { rank, size } => {
                let _: [&usize; 2] = [rank, size];
            }
            Error::NotMember { rank, group } => {
                let _: (&usize, &String) = (rank, group);
            }
            Error::Unsupported { backend, what } => {
                let _: [&String; 2] = [backend, what];
            }
            Error::BackendUnavailable { backend, reason } => {
                let _: [&String; 2] = [backend, reason];
            }
            Error::UnknownBackend { name, known } => {
                let _: (&String, &Vec<String>) = (name, known);
            }
            Error::ShapeMismatch { argument, expected, got }
            | Error::KindMismatch { argument, expected, got }
            | Error::DeviceMismatch { argument, expected, got } => {
                let _: (&'static str, &String, &String) = (argument, expected, got);
            }
            Error::Desync { op, seq, rank, theirs, ours } => {
                let _: (&String, &u64, &usize, &String, &String) = (op, seq, rank, theirs, ours);
            }
            Error::Timeout { op, seq, elapsed, missing } => {
                let _: (&String, &u64, &Duration, &Vec<usize>) = (op, seq, elapsed, missing);
            }
            Error::PeerLost { rank, op, source } => {
                let _: (&usize, &String, &Option<std::io::Error>) = (rank, op, source);
            }
            Error::Poisoned { cause } => {
                let _: &Arc<Error> = cause;
            }
            Error::Store { op, key, reason } => {
                let _: [&String; 3] = [op, key, reason];
            }
            Error::Rendezvous { reason } | Error::Object { reason } | Error::Callback { reason } => {
                let _: &String = reason;
            }
            Error::Io(error) => {
                let _: &std::io::Error = error;
            }
            Error::Torch(error) => {
                let _: &tch::TchError = error;
            }
            Error::NotInitialized | Error::AlreadyInitialized | Error::Aborted => {}
            _ => {} // it may grow
        }
    }

    fn ranks() -> Result<()> {
        let _: Vec<usize> = dist::testing::run_threads(2, |group: ProcessGroup| group.rank());
        dist::testing::run_processes(2, "name", || 3);
        dist::launch::local(2, || Err::<(), _>("any error that can be shown"))
    }

    fn stores(store: &dyn Store) -> Result<()> {
        store.set("k", b"v")?;
        let _: Vec<u8> = store.get("k")?;
        let _: i64 = store.add("k", -1)?;
        let _: Vec<u8> = store.compare_set("k", b"", b"v")?;
        let _: bool = store.check(&["k"])?;
        store.wait(&["k"], Duration::ZERO)?;
        let _: bool = store.delete("k")?;
        let _: usize = store.num_keys()?;
        store.append("k", b"v")?;
        let _: Duration = store.timeout();
        store.set_timeout(Duration::ZERO);
        let server: TcpStore = TcpStore::serve("localhost", 0)?;
        let _: u16 = server.port();
        let _: TcpStore = TcpStore::connect("localhost", 1, Duration::ZERO)?;
        let _: FileStore = FileStore::new("path")?;
        let _ = PrefixStore::new("prefix", server);
        Ok(())
    }

    fn gradients(t: &mut Tensor, u: &Tensor) -> Result<()> {
        let hook: HookHandle = autograd::on_grad_accumulated(u, |_: &Tensor| Ok(()))?;
        hook.remove();
        let hook: HookHandle = autograd::on_grad(u, |grad: &Tensor| Ok(Some(grad * 2.0)))?;
        hook.detach();
        autograd::after_backward(|| Ok(()))?;
        autograd::set_grad(t, None)?;
        autograd::set_grad(t, Some(u))?;
        autograd::backward(u)?;
        autograd::backward_with_grad(&[u], &[u])
    }

    fn differentiable(t: &Tensor, g: &ProcessGroup) -> Result<[Tensor; 9]> {
        Ok([
            functional::all_reduce(t, ReduceOp::Sum, g)?,
            functional::all_gather(t, 0, g)?,
            functional::reduce_scatter(t, 0, ReduceOp::Sum, g)?,
            functional::all_to_all(t, 0, 1, g)?,
            functional::broadcast(t, 0, g)?,
            functional::copy_to_group(t, g)?,
            functional::reduce_from_group(t, g)?,
            functional::scatter_to_group(t, -1, g)?,
            functional::gather_from_group(t, -1, g)?,
        ])
    }

    fn data_parallel(net: nn::Linear, vs: &nn::VarStore, g: &ProcessGroup, t: &Tensor) -> Result<nn::Linear> {
        let options = DdpOptions::new()
            .bucket_cap_mb(25)
            .first_bucket_mb(1)
            .broadcast_buffers(true)
            .find_unused_parameters(true)
            .gradient_as_bucket_view(true)
            .static_graph(true)
            .ignore(["name"]);
        let mut model = DistributedDataParallel::new(net, vs, g, options)?;
        let _: Tensor = model.forward(t)?;
        let _: Tensor = model.forward_t(t, true)?;
        let loss: Tensor = model.forward_with(|net: &nn::Linear| net.forward(t))?;
        model.backward(&loss)?;
        let _: i32 = model.no_sync(|| 3);
        let _: &nn::Linear = model.module();
        hook(&mut model)?;
        let mut sampler = DistributedSampler::new(10, g);
        sampler.set_epoch(1);
        let sampler: DistributedSampler = DistributedSampler::with_ranks(10, 0, 2)?;
        let sampler = sampler.shuffle(true).seed(1).drop_last(false).even(false);
        let _: (Vec<i64>, usize) = (sampler.indices(), sampler.len());
        Ok(model.into_inner())
    }

    fn hook(model: &mut DistributedDataParallel<nn::Linear>) -> Result<()> {
        model.set_comm_hook(hooks::Fp16Compress)?;
        model.set_comm_hook(hooks::Bf16Compress)
    }

    fn model_parallel(path: nn::Path<'_>, g: &ProcessGroup, t: &Tensor) -> Result<()> {
        let mesh = DeviceMesh::new(g, &[("dp", 2), ("tp", 2)])?;
        let _: usize = mesh.rank("dp")? + mesh.size("tp")?;
        let _: ProcessGroup = mesh.flatten(&["dp", "tp"])?;
        let tp: ProcessGroup = mesh.group("tp")?.clone();
        #[allow(clippy::needless_update, reason = "fields may be added")]
        let config = ParallelLinearConfig {
            bias: true,
            gather_output: false,
            input_is_parallel: true,
            sequence_parallel: false,
            ..Default::default()
        };
        let column = ColumnParallelLinear::new(&path / "c", 4, 8, config, &tp)?;
        let row = RowParallelLinear::new(path.clone() / "r", 8, 4, config, &tp)?;
        let _: (&Tensor, &Option<Tensor>) = (&column.ws, &column.bs);
        let _: (&Tensor, &Option<Tensor>) = (&row.ws, &row.bs);
        let _: Tensor = row.forward(&column.forward(t));
        ColumnParallelLinear::from_full(&path / "cf", t, Some(t), config, &tp)?;
        RowParallelLinear::from_full(&path / "rf", t, None, config, &tp)?;
        let embedding = VocabParallelEmbedding::new(&path / "e", 16, 4, Default::default(), &tp)?;
        let _: Tensor = embedding.forward(t);
        let _: Tensor = vocab_parallel_cross_entropy(t, t, &tp)?;
        let schedules = [Schedule::GPipe, Schedule::OneFOneB, Schedule::Interleaved, Schedule::ZeroBubble];
        let stage = Stage::new(nn::seq());
        let pipeline = Pipeline::new(vec![stage], 4, schedules[1], g)?;
        let loss = |y: &Tensor, target: &Tensor| y.mse_loss(target, tch::Reduction::Mean);
        let _: Option<Tensor> = pipeline.step(Some(t), Some(t), loss)?;
        let _: Option<Tensor> = pipeline.eval(Some(t), None, loss)?;
        Ok(())
    }
}

/// y = x², with the gradient by hand.
struct Square;

impl Function for Square {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.save_for_backward(&[&inputs[0]]);
        Ok(vec![&inputs[0] * &inputs[0]])
    }

    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        assert!(ctx.needs_input_grad(0));
        Ok(vec![grads[0].as_ref().map(|grad| grad * &ctx.saved()[0] * 2.0)])
    }
}

#[test]
fn a_function_of_the_user_has_the_gradient_it_says() {
    let x = Tensor::from_slice(&[3.0f64]).set_requires_grad(true);
    let y = Square.apply(&[&x]).unwrap().remove(0);
    autograd::backward(&y.sum(Kind::Double)).unwrap();
    assert_eq!(Vec::<f64>::try_from(x.grad()).unwrap(), [6.0]);
}

#[test]
fn the_default_group_of_a_rank_thread_is_its_world() {
    let sums = dist::testing::run_threads(3, |group| -> Result<f64> {
        assert_eq!(
            (dist::rank()?, dist::world_size()?, dist::world()?.rank()),
            (group.rank(), 3, group.rank())
        );
        let mut one = Tensor::ones([1], (Kind::Double, Device::Cpu));
        dist::all_reduce(&mut one, ReduceOp::Sum)?;
        Ok(one.double_value(&[0]))
    });
    assert!(sums.into_iter().all(|sum| sum.unwrap() == 3.0));
}

#[test]
fn a_training_step_as_a_user_writes_it_averages_the_gradients() {
    let weights = dist::testing::run_threads(2, |group| -> Result<f64> {
        let vs = nn::VarStore::new(Device::Cpu);
        let config = nn::LinearConfig { ws_init: nn::Init::Const(1.0), bias: false, ..Default::default() };
        let net = nn::linear(vs.root() / "l", 1, 1, config);
        let model = DistributedDataParallel::new(net, &vs, &group, DdpOptions::default())?;
        let mut optimizer = nn::Sgd::default().build(&vs, 0.5)?;
        // The gradient of w·x is x: 2 on rank 0 and 4 on rank 1, 3 on average.
        let x = Tensor::full([1, 1], 2.0 * (group.rank() + 1) as f64, (Kind::Float, Device::Cpu));
        model.backward(&model.forward(&x)?.sum(Kind::Float))?;
        optimizer.step();
        Ok(model.module().ws.double_value(&[0, 0]))
    });
    assert!(weights.into_iter().all(|w| w.unwrap() == 1.0 - 0.5 * 3.0));
}
