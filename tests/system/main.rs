//! Whole-system tests: `torpor` on real processes, each of which checks all that it owns.
//!
//! Every victim of `tests/victims/` has one kind of state. The victim alone knows what is right: the tests
//! only start, dump, restore and ask.

mod connections;
mod content;
mod encoding;
mod faults;
mod files;
mod golden;
mod interrupted;
mod io_uring;
mod ipc;
mod keeper;
mod lazy;
mod obstacles;
mod pty;
mod refusals;
mod snapshot;
mod soft_dirty;
mod state;
mod terminal;
mod threads;
mod track;
mod tree;
mod unix;

use libtest_mimic::Arguments;

fn main() {
    torpor_tests::become_subreaper();
    let mut arguments = Arguments::from_args();
    // Timers and timeouts want the machine not to be crowded.
    arguments.test_threads.get_or_insert(2);
    let mut trials = state::trials();
    trials.extend(faults::trials());
    trials.extend(files::trials());
    trials.extend(ipc::trials());
    trials.extend(terminal::trials());
    trials.extend(connections::trials());
    trials.extend(content::trials());
    trials.extend(track::trials());
    trials.extend(keeper::trials());
    trials.extend(threads::trials());
    trials.extend(soft_dirty::trials());
    trials.extend(tree::trials());
    trials.extend(unix::trials());
    trials.extend(refusals::trials());
    trials.extend(interrupted::trials());
    trials.extend(obstacles::trials());
    trials.extend(pty::trials());
    trials.extend(io_uring::trials());
    trials.extend(encoding::trials());
    trials.extend(lazy::trials());
    trials.extend(snapshot::trials());
    if !torpor_tests::is_root() {
        eprintln!("not root: tests that need it are ignored");
        trials = trials.into_iter().map(|t| t.with_ignored_flag(true)).collect();
    }
    trials.extend(golden::trials());
    libtest_mimic::run(&arguments, trials).exit();
}
