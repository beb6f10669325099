//! What the page on `autograd` promises.

use std::sync::mpsc::{Receiver, channel};
use std::sync::{Arc, Barrier};
use std::thread;

use tch::{Device, Kind, Tensor, no_grad};

use super::*;
use crate::{Error, Result};

const F: (Kind, Device) = (Kind::Double, Device::Cpu);

fn leaf(value: f64) -> Tensor {
    Tensor::from(value).set_requires_grad(true)
}

fn grad(t: &Tensor) -> f64 {
    t.grad().double_value(&[])
}

/// A hook on `t` that reports its gradient.
fn report(t: &Tensor) -> (HookHandle, Receiver<f64>) {
    let (tx, rx) = channel();
    let hook = on_grad_accumulated(t, move |t| {
        tx.send(grad(t)).unwrap();
        Ok(())
    });
    (hook.unwrap(), rx)
}

fn lost(rank: usize) -> Error {
    Error::PeerLost { rank, op: "all_reduce 7".into(), source: None }
}

fn is_lost(result: &Result<()>, rank: usize) -> bool {
    matches!(result, Err(Error::PeerLost { rank: r, .. }) if *r == rank)
}

#[test]
fn a_parameter_used_twice_fires_once_with_the_whole_gradient() {
    let w = leaf(3.0);
    let (_hook, seen) = report(&w);
    backward(&(&w * 2 + &w * 5)).unwrap();
    assert_eq!(seen.try_iter().collect::<Vec<_>>(), [7.0]);
    backward_with_grad(&[&(&w * 2), &(&w * 5)], &[&Tensor::from(1.0f64), &Tensor::from(10.0f64)]).unwrap();
    assert_eq!(seen.try_iter().collect::<Vec<_>>(), [59.0], "accumulated on top of 7");
}

#[test]
fn an_unused_parameter_does_not_fire() {
    let (w, unused) = (leaf(1.0), leaf(1.0));
    let (_hook, seen) = report(&unused);
    backward(&(&w * 2)).unwrap();
    assert_eq!(seen.try_iter().count(), 0);
}

#[test]
fn hooks_survive_shallow_clone_and_set_data_and_may_come_after_forward() {
    let mut w = leaf(3.0);
    let loss = w.shallow_clone().square();
    let (hook, seen) = report(&w.shallow_clone());
    backward(&loss).unwrap();
    assert_eq!(seen.recv().unwrap(), 6.0);
    w.set_data(&Tensor::from(10.0f64));
    w.zero_grad();
    backward(&w.square()).unwrap();
    assert_eq!(seen.recv().unwrap(), 20.0);
    hook.detach();
    let other = w.shallow_clone();
    drop(w);
    backward(&other.square()).unwrap();
    assert_eq!(seen.recv().unwrap(), 40.0, "a detached hook stays while any handle lives");
}

#[test]
fn hooks_run_in_order_and_a_dropped_handle_removes_its_own_only() {
    let w = leaf(1.0);
    let (tx, log) = channel();
    let hook = |name: &'static str| {
        let tx = tx.clone();
        on_grad_accumulated(&w, move |_| {
            tx.send(name).unwrap();
            Ok(())
        })
        .unwrap()
    };
    let (a, b, c) = (hook("a"), hook("b"), hook("c"));
    let run = || {
        backward(&(&w * 1)).unwrap();
        log.try_iter().collect::<Vec<_>>()
    };
    assert_eq!(run(), ["a", "b", "c"]);
    drop(b);
    assert_eq!(run(), ["a", "c"]);
    a.remove();
    c.remove();
    assert!(run().is_empty());
}

#[test]
fn removing_a_hook_frees_what_it_captured() {
    let w = leaf(1.0);
    let token = Arc::new(());
    let held = token.clone();
    let (own, of_own) = (w.shallow_clone(), token.clone());
    let hook = on_grad_accumulated(&w, move |_| {
        let _ = (&held, &own, &of_own);
        Ok(())
    })
    .unwrap();
    assert_eq!(Arc::strong_count(&token), 3);
    drop(hook);
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn a_hook_goes_with_its_tensor() {
    let token = Arc::new(());
    let w = leaf(1.0);
    let held = token.clone();
    on_grad(&w, move |_| Ok(Some(Tensor::from(Arc::strong_count(&held) as f64)))).unwrap().detach();
    backward(&(&w * 1)).unwrap();
    drop(w);
    assert_eq!(Arc::strong_count(&token), 1);
}

#[test]
fn a_hook_may_register_and_remove_hooks() {
    let w = leaf(1.0);
    let slot = Arc::new(parking_lot::Mutex::new(None));
    let inner = slot.clone();
    let hook = on_grad_accumulated(&w, move |w| {
        let (handle, _) = report(w);
        *inner.lock() = Some(handle);
        inner.lock().take();
        Ok(())
    });
    let _hook = hook.unwrap();
    backward(&(&w * 1)).unwrap();
    assert!(slot.lock().is_none());
}

#[test]
fn hooks_are_refused_where_they_would_never_fire() {
    let w = leaf(1.0);
    let computed = &w * 2;
    let plain = Tensor::from(1.0);
    for (t, why) in [(&computed, "leaf"), (&plain, "requires no gradient"), (&Tensor::new(), "undefined")] {
        let error = on_grad_accumulated(t, |_| Ok(())).unwrap_err();
        assert!(matches!(error, Error::InvalidArgument { argument: "t", .. }), "{error}");
        assert!(error.to_string().contains(why), "{error}");
    }
    assert!(matches!(on_grad(&plain, |_| Ok(None)), Err(Error::InvalidArgument { .. })));
    assert!(matches!(on_grad(&Tensor::new(), |_| Ok(None)), Err(Error::InvalidArgument { .. })));
}

#[test]
fn gradient_hooks_chain_and_may_leave_the_gradient_alone() {
    let x = leaf(2.0);
    let y = &x * 3;
    let _a = on_grad(&y, |g| Ok(Some(g + 1))).unwrap();
    let _b = on_grad(&y, |_| Ok(None)).unwrap();
    let c = on_grad(&y, |g| Ok(Some(g * 10))).unwrap();
    let loss = &y * 1;
    let run = || {
        let keep = BackwardOptions::new().retain_graph(true);
        backward_with(&[&loss], &[&Tensor::from(1.0f64)], keep).unwrap();
    };
    run();
    assert_eq!(grad(&x), 60.0, "(1 + 1) * 10 * 3");
    drop(c);
    run();
    assert_eq!(grad(&x), 66.0, "(1 + 1) * 3 more");
}

#[test]
fn a_gradient_of_the_wrong_shape_or_kind_from_a_hook_is_a_typed_error() {
    let x = leaf(2.0);
    let hook = on_grad(&x, |_| Ok(Some(Tensor::zeros([3], F)))).unwrap();
    assert!(matches!(backward(&x.square()), Err(Error::ShapeMismatch { .. })));
    drop(hook);
    let _hook = on_grad(&x, |_| Ok(Some(Tensor::from(1.0f32)))).unwrap();
    assert!(matches!(backward(&x.square()), Err(Error::KindMismatch { .. })));
}

#[test]
fn a_typed_error_comes_through_backward_and_later_backwards_work() {
    let w = leaf(2.0);
    let hook = on_grad_accumulated(&w, |_| Err(lost(3))).unwrap();
    assert!(is_lost(&backward(&w.square()), 3));
    let text = w.square().f_backward().unwrap_err().to_string();
    assert!(text.contains("rank 3 was lost"), "{text}");
    assert!(is_lost(&backward(&w.square()), 3), "also after an error that only tch saw");
    drop(hook);
    let _ = w.grad().zero_();
    backward(&w.square()).unwrap();
    assert_eq!(grad(&w), 4.0);
}

#[test]
fn a_panic_in_a_hook_is_an_error_of_backward() {
    let w = leaf(2.0);
    let hook = on_grad_accumulated(&w, |_| panic!("number {}", 17)).unwrap();
    let error = backward(&w.square()).unwrap_err();
    assert!(matches!(&error, Error::Callback { reason } if reason.contains("number 17")), "{error}");
    drop(hook);
    backward(&w.square()).unwrap();
}

#[test]
fn a_typed_error_survives_a_panicking_tch_backward_inside_a_hook() {
    let (w, inner) = (leaf(2.0), leaf(1.0));
    let _fails = on_grad_accumulated(&inner, |_| Err(lost(5))).unwrap();
    let seen = inner.shallow_clone();
    let _hook = on_grad(&w, move |_| {
        seen.square().backward(); // panics, as tch does
        Ok(None)
    })
    .unwrap();
    // Grad mode is off in hooks: what the hook computes has no graph.
    let error = backward(&w.square()).unwrap_err();
    assert!(matches!(error, Error::Callback { .. }), "{error}");
    let seen = inner.shallow_clone();
    let other = leaf(2.0);
    let loss = seen.square();
    let loss = parking_lot::Mutex::new(loss);
    let _hook = on_grad(&other, move |_| {
        loss.lock().backward();
        Ok(None)
    })
    .unwrap();
    assert!(is_lost(&backward(&other.square()), 5));
}

#[test]
fn after_backward_runs_after_every_hook_in_order_and_may_queue_more() {
    let (a, b) = (leaf(1.0), leaf(2.0));
    let (tx, log) = channel();
    let hook = |t: &Tensor, name: &'static str| {
        let tx = tx.clone();
        on_grad_accumulated(t, move |_| {
            tx.send(name.to_owned()).unwrap();
            let tx = tx.clone();
            after_backward(move || {
                tx.send(format!("end of {name}")).unwrap();
                after_backward(move || {
                    tx.send("more".to_owned()).unwrap();
                    Ok(())
                })
            })
        })
        .unwrap()
    };
    let _hooks = (hook(&a, "hook"), hook(&b, "hook"));
    backward(&(&a * &b)).unwrap();
    let log: Vec<String> = log.try_iter().collect();
    assert_eq!(log, ["hook", "hook", "end of hook", "end of hook", "more", "more"]);
}

#[test]
fn after_backward_is_refused_outside_hooks_and_its_errors_are_those_of_backward() {
    assert!(matches!(after_backward(|| Ok(())), Err(Error::InvalidArgument { .. })));
    let w = leaf(1.0);
    let hook = on_grad_accumulated(&w, |_| after_backward(|| Err(lost(1)))).unwrap();
    assert!(is_lost(&backward(&w.square()), 1));
    drop(hook);
    let _hook = on_grad_accumulated(&w, |_| after_backward(|| panic!("late"))).unwrap();
    assert!(matches!(backward(&w.square()), Err(Error::Callback { .. })));
}

#[test]
fn a_failed_backward_drops_its_callbacks_without_running_them() {
    let (a, b) = (leaf(1.0), leaf(1.0));
    let token = Arc::new(());
    let held = token.clone();
    let _first = on_grad_accumulated(&b, move |_| {
        let held = held.clone();
        after_backward(move || panic!("{held:?} must not run"))
    })
    .unwrap();
    let _second = on_grad_accumulated(&a, |_| Err(lost(2))).unwrap();
    // b is computed first: its node is nearer to the loss.
    assert!(is_lost(&backward(&(a.square().square() * &b)), 2));
    assert_eq!(Arc::strong_count(&token), 2, "the test's and the hook's");
}

#[test]
fn after_backward_may_run_a_backward() {
    let (w, v) = (leaf(3.0), leaf(5.0));
    let loss = parking_lot::Mutex::new(Some(v.square()));
    let _hook = on_grad_accumulated(&w, move |_| {
        let loss = loss.lock().take();
        after_backward(move || loss.as_ref().map_or(Ok(()), backward))
    })
    .unwrap();
    backward(&w.square()).unwrap();
    assert_eq!((grad(&w), grad(&v)), (6.0, 10.0));
}

#[test]
fn set_grad_checks_and_shares() {
    let mut w = Tensor::zeros([2], F).set_requires_grad(true);
    let wrong = |g: &Tensor, w: &mut Tensor| set_grad(w, Some(g)).unwrap_err();
    assert!(matches!(wrong(&Tensor::zeros([3], F), &mut w), Error::ShapeMismatch { .. }));
    assert!(matches!(
        wrong(&Tensor::zeros([2], (Kind::Float, Device::Cpu)), &mut w),
        Error::KindMismatch { .. }
    ));
    let itself = w.shallow_clone();
    assert!(matches!(wrong(&itself, &mut w), Error::InvalidArgument { .. }));
    assert!(matches!(set_grad(&mut Tensor::new(), None), Err(Error::InvalidArgument { .. })));
    let g = Tensor::ones([2], F);
    set_grad(&mut w, Some(&g)).unwrap();
    backward(&w.sum(Kind::Double)).unwrap();
    assert_eq!(Vec::<f64>::try_from(&g).unwrap(), [2.0, 2.0], "accumulated in place");
    set_grad(&mut w, Some(&Tensor::new())).unwrap();
    assert!(!w.grad().defined());
}

#[test]
fn backward_refuses_what_has_no_gradient() {
    assert!(matches!(backward(&Tensor::from(1.0)), Err(Error::InvalidArgument { argument: "loss", .. })));
    assert!(matches!(backward(&Tensor::new()), Err(Error::InvalidArgument { .. })));
    let w = Tensor::zeros([2], F).set_requires_grad(true);
    assert!(matches!(backward(&(&w * 2)), Err(Error::InvalidArgument { .. })));
    assert!(matches!(backward_with_grad(&[&w], &[]), Err(Error::InvalidArgument { .. })));
    assert!(matches!(backward_with_grad(&[&w], &[&Tensor::zeros([3], F)]), Err(Error::ShapeMismatch { .. })));
    backward_with_grad(&[], &[]).unwrap();
    let y = w.square().sum(Kind::Double);
    backward(&y).unwrap();
    assert!(matches!(backward(&y), Err(Error::Torch(_))), "the graph is gone");
}

#[test]
fn ranks_as_threads_run_backwards_at_once_and_one_failure_stays_its_own() {
    let n = 4;
    let barrier = Arc::new(Barrier::new(n));
    let threads: Vec<_> = (0..n)
        .map(|rank| {
            let barrier = barrier.clone();
            thread::spawn(move || {
                let w = leaf(rank as f64);
                // All hooks wait for one another: backwards must not exclude each other.
                let _hook = on_grad_accumulated(&w, move |_| {
                    barrier.wait();
                    if rank == 2 { Err(lost(rank)) } else { Ok(()) }
                })
                .unwrap();
                (backward(&w.square()), grad(&w))
            })
        })
        .collect();
    for (rank, thread) in threads.into_iter().enumerate() {
        let (result, grad) = thread.join().unwrap();
        assert_eq!(is_lost(&result, rank), rank == 2, "{result:?}");
        assert_eq!(grad, 2.0 * rank as f64);
    }
}

/// Two outputs of two inputs, with everything that a context can do.
struct MulAdd {
    factor: f64,
}

impl Function for MulAdd {
    fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        ctx.save_for_backward(&[&inputs[0], &inputs[1]]);
        Ok(vec![&inputs[0] * &inputs[1] * self.factor, &inputs[0] + &inputs[1]])
    }
    fn backward(&mut self, ctx: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        let [a, b] = ctx.saved() else { return Err(Error::invalid("saved", "two tensors")) };
        let one = |other: &Tensor, index| {
            let product = grads[0].as_ref().map(|g| g * other * self.factor);
            let sum = grads[1].as_ref().map(|g| g.shallow_clone());
            let both = match (product, sum) {
                (Some(p), Some(s)) => Some(p + s),
                (one, other) => one.or(other),
            };
            both.filter(|_| ctx.needs_input_grad(index))
        };
        Ok(vec![one(b, 0), one(a, 1)])
    }
}

#[test]
fn a_function_has_gradients_for_all_inputs_from_all_outputs() {
    let (a, b) = (leaf(3.0), leaf(5.0));
    let y = MulAdd { factor: 2.0 }.apply(&[&a, &b]).unwrap();
    assert_eq!((y[0].double_value(&[]), y[1].double_value(&[])), (30.0, 8.0));
    backward(&(&y[0] + &y[1] * 100)).unwrap();
    assert_eq!((grad(&a), grad(&b)), (110.0, 106.0));
}

#[test]
fn an_unused_output_has_no_gradient_and_an_input_that_needs_none_gets_none() {
    let (a, b) = (leaf(3.0), Tensor::from(5.0f64));
    let y = MulAdd { factor: 2.0 }.apply(&[&a, &b]).unwrap();
    backward(&y[1]).unwrap();
    assert_eq!(grad(&a), 1.0);
    assert!(!b.grad().defined());
}

#[test]
fn gradients_of_gradients_go_through_saved_tensors() {
    let (a, b) = (leaf(3.0), leaf(5.0));
    let y = MulAdd { factor: 2.0 }.apply(&[&a, &b]).unwrap();
    // d(y0^2)/da = 2 y0 * 2 b = 8 a b^2, whose derivatives are 8 b^2 and 16 a b.
    let g = Tensor::run_backward(&[y[0].square()], &[&a], true, true);
    assert_eq!(g[0].double_value(&[]), 600.0);
    backward(&g[0]).unwrap();
    assert_eq!((grad(&a), grad(&b)), (200.0, 240.0));
}

#[test]
fn nothing_is_recorded_where_nothing_requires_a_gradient() {
    let token = Arc::new(());
    struct Holds(#[allow(dead_code)] Arc<()>);
    impl Function for Holds {
        fn forward(&mut self, ctx: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
            assert!(!ctx.needs_input_grad(7));
            Ok(vec![&inputs[0] * if ctx.needs_input_grad(0) { 2 } else { 1 }])
        }
        fn backward(&mut self, _: &Context, _: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
            Ok(vec![None])
        }
    }
    let w = leaf(1.0);
    let y = no_grad(|| Holds(token.clone()).apply(&[&w])).unwrap();
    assert!(!y[0].requires_grad());
    assert_eq!(y[0].double_value(&[]), 1.0);
    assert_eq!(Arc::strong_count(&token), 1);
    let y = Holds(token.clone()).apply(&[&w]).unwrap();
    assert!(y[0].requires_grad());
    assert_eq!(Arc::strong_count(&token), 2);
    backward(&y[0]).unwrap();
    drop(y);
    assert_eq!(Arc::strong_count(&token), 1, "the function dies with the graph");
}

/// Fails, panics or miscounts, as told.
struct Faulty(&'static str);

impl Function for Faulty {
    fn forward(&mut self, _: &mut Context, inputs: &[Tensor]) -> Result<Vec<Tensor>> {
        match self.0 {
            "forward fails" => Err(lost(8)),
            "forward panics" => panic!("in forward"),
            "undefined" => Ok(vec![Tensor::new()]),
            _ => Ok(vec![inputs[0].shallow_clone()]),
        }
    }
    fn backward(&mut self, _: &Context, grads: &[Option<Tensor>]) -> Result<Vec<Option<Tensor>>> {
        match self.0 {
            "backward fails" => Err(lost(9)),
            "backward panics" => panic!("in backward"),
            "too many" => Ok(vec![None, None]),
            _ => Ok(grads.iter().map(|g| g.as_ref().map(Tensor::shallow_clone)).collect()),
        }
    }
}

impl Drop for Faulty {
    fn drop(&mut self) {
        assert_ne!(self.0, "drop panics", "in drop");
    }
}

#[test]
fn errors_and_panics_of_a_function_are_typed_and_leave_autograd_usable() {
    let w = leaf(1.0);
    let apply = |what| Faulty(what).apply(&[&w]);
    assert!(is_lost(&apply("forward fails").map(|_| ()), 8));
    assert!(matches!(apply("forward panics"), Err(Error::Callback { .. })));
    assert!(matches!(apply("undefined"), Err(Error::Callback { .. })));
    let run = |what| backward(&apply(what).unwrap()[0]);
    assert!(is_lost(&run("backward fails"), 9));
    assert!(matches!(run("backward panics"), Err(Error::Callback { .. })));
    assert!(matches!(run("too many"), Err(Error::Callback { .. })));
    run("drop panics").unwrap();
    run("nothing").unwrap();
    assert_eq!(grad(&w), 2.0, "drop panics and nothing");
    assert!(matches!(Faulty("").apply(&[&Tensor::new()]), Err(Error::InvalidArgument { .. })));
}

#[test]
fn functions_of_many_threads_do_not_disturb_each_other() {
    let threads: Vec<_> = (0..4)
        .map(|i| {
            thread::spawn(move || {
                for _ in 0..50 {
                    let (a, b) = (leaf(f64::from(i)), leaf(2.0));
                    let y = MulAdd { factor: 1.0 }.apply(&[&a, &b]).unwrap();
                    backward(&y[0]).unwrap();
                    assert_eq!((grad(&a), grad(&b)), (2.0, f64::from(i)));
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_backward_inside_a_hook_may_reach_other_parameters() {
    let (w, v) = (leaf(2.0), leaf(5.0));
    let other = v.shallow_clone();
    let _hook = on_grad_accumulated(&w, move |_| backward(&tch::with_grad(|| other.square()))).unwrap();
    backward(&w.square()).unwrap();
    assert_eq!((grad(&w), grad(&v)), (4.0, 10.0));
}

#[test]
fn a_backward_inside_a_hook_may_not_reach_its_own_parameter() {
    let w = leaf(2.0);
    let _hook = on_grad_accumulated(&w, move |w| backward(&tch::with_grad(|| w.square()))).unwrap();
    let error = backward(&w.square()).unwrap_err();
    assert!(matches!(error, Error::Callback { .. }), "{error}");
}
