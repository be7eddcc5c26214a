//! What this machine and our privileges allow.
//!
//! Everything is concluded from the probes, none of it from kernel versions or from being root: a container
//! may take from root what matters here, and an ordinary user may have it.

use std::fmt::Write as _;

use caps::{CapSet, CapsHashSet};
use nix::errno::Errno;
use serde::Serialize;
use torpor_kernel::probe::{self, Probe, State};

use crate::exit::Exit;
use crate::output::{self, Table};

/// What a dump cannot do without.
const FOR_DUMP: &[&str] = &["pidfd_open", "pidfd_getfd", "ptrace", "kcmp", "memfd_create"];
/// What a restore cannot do without.
const FOR_RESTORE: &[&str] = &["clone3 set_tid", "ptrace", "memfd_create", "PR_SET_MM_MAP"];

/// A step of the ladder of privileges.
struct Rung {
    name: &'static str,
    needs: &'static [&'static str],
    gives: &'static str,
}

const LADDER: &[Rung] = &[
    Rung {
        name: "any user",
        needs: FOR_DUMP,
        gives: "check and dump processes of the same user; show and verify images, plan a restore (not do it)",
    },
    Rung {
        name: "CAP_CHECKPOINT_RESTORE",
        needs: &["clone3 set_tid", "CAP_CHECKPOINT_RESTORE"],
        gives: "restore processes of the same user, with the pids they had",
    },
    Rung {
        name: "and CAP_SYS_PTRACE, CAP_NET_ADMIN",
        needs: &["CAP_CHECKPOINT_RESTORE", "CAP_SYS_PTRACE", "CAP_NET_ADMIN"],
        gives: "dump processes of other users; socket buffers above the limit",
    },
    Rung {
        name: "root",
        needs: &["CAP_CHECKPOINT_RESTORE", "CAP_SYS_PTRACE", "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SETUID"],
        gives: "restore processes of any user, with any capabilities",
    },
    Rung {
        name: "and CAP_SYS_RESOURCE",
        needs: &["CAP_SYS_RESOURCE"],
        gives: "limits above our own hard limits, a lower oom_score_adj",
    },
];

/// What was found.
struct Found {
    probes: Vec<Probe>,
    capabilities: CapsHashSet,
}

#[derive(Serialize)]
struct Report<'a> {
    dump: bool,
    restore: bool,
    capabilities: Vec<String>,
    ladder: Vec<Step<'a>>,
    interfaces: Vec<Interface<'a>>,
}

#[derive(Serialize)]
struct Step<'a> {
    name: &'a str,
    reached: bool,
    missing: Vec<&'a str>,
    gives: &'a str,
}

#[derive(Serialize)]
struct Interface<'a> {
    name: &'a str,
    present: bool,
    errno: Option<String>,
    why: &'a str,
}

pub(super) fn run(json: bool) -> anyhow::Result<Exit> {
    // Where capabilities cannot be read there are none to speak of.
    let capabilities = caps::read(None, CapSet::Effective).unwrap_or_default();
    let found = Found { probes: probe::all(), capabilities };
    if json {
        output::json_pretty(&found.report())?;
    } else {
        output::print(&found.text()?)?;
    }
    Ok(found.verdict())
}

/// Whether a restore with the original pids is possible; if not, why.
pub(crate) fn may_restore() -> Result<(), String> {
    match probe::one("clone3 set_tid") {
        Some(State::Missing { errno }) => Err(format!("clone3 set_tid: {errno}")),
        Some(State::Present) | None => Ok(()),
    }
}

impl Found {
    /// Why an interface or capability is not there; `None` if it is.
    fn lack(&self, name: &str) -> Option<Errno> {
        if let Some(probe) = self.probes.iter().find(|p| p.name == name) {
            return match probe.state {
                State::Present => None,
                State::Missing { errno } => Some(errno),
            };
        }
        let has = name.parse().is_ok_and(|capability| self.capabilities.contains(&capability));
        (!has).then_some(Errno::EPERM)
    }

    fn missing<'n>(&self, names: &[&'n str]) -> Vec<&'n str> {
        names.iter().copied().filter(|name| self.lack(name).is_some()).collect()
    }

    fn verdict(&self) -> Exit {
        let lacks: Vec<Errno> =
            FOR_DUMP.iter().chain(FOR_RESTORE).filter_map(|name| self.lack(name)).collect();
        if lacks.is_empty() {
            Exit::Ok
        } else if lacks.iter().all(|errno| matches!(errno, Errno::EPERM | Errno::EACCES)) {
            Exit::Permission
        } else {
            Exit::Unfit
        }
    }

    fn report(&self) -> Report<'_> {
        let mut capabilities: Vec<String> = self.capabilities.iter().map(ToString::to_string).collect();
        capabilities.sort_unstable();
        Report {
            dump: self.missing(FOR_DUMP).is_empty(),
            restore: self.missing(FOR_RESTORE).is_empty(),
            capabilities,
            ladder: self.ladder(),
            interfaces: self
                .probes
                .iter()
                .map(|p| Interface {
                    name: p.name,
                    present: p.state.is_present(),
                    errno: self.lack(p.name).map(|errno| format!("{errno:?}")),
                    why: p.why,
                })
                .collect(),
        }
    }

    fn ladder(&self) -> Vec<Step<'_>> {
        let step = |rung: &Rung| {
            let missing = self.missing(rung.needs);
            Step { name: rung.name, reached: missing.is_empty(), missing, gives: rung.gives }
        };
        LADDER.iter().map(step).collect()
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut out = String::new();
        let mut table = Table::new(&["KERNEL INTERFACE", "HERE", "WHAT FOR"], &[]);
        for probe in self.probes.iter().filter(|p| !p.name.starts_with("CAP_")) {
            let here =
                self.lack(probe.name).map_or_else(|| "yes".to_owned(), |errno| format!("no: {errno:?}"));
            table.row([probe.name.to_owned(), here, probe.why.to_owned()]);
        }
        write!(out, "{table}")?;
        writeln!(out, "\ncapabilities: {}", self.capability_list())?;
        writeln!(out, "\nwith more privilege more works")?;
        let mut table = Table::new(&["PRIVILEGE", "HERE", "WHAT WORKS"], &[]);
        for step in self.ladder() {
            let here = if step.reached { "yes".into() } else { format!("no: {}", step.missing.join(", ")) };
            table.row([step.name.to_owned(), here, step.gives.to_owned()]);
        }
        write!(out, "{table}")?;
        writeln!(out, "\ndump:    {}", self.possible(FOR_DUMP))?;
        writeln!(out, "restore: {}", self.possible(FOR_RESTORE))?;
        Ok(out)
    }

    fn possible(&self, needs: &[&str]) -> String {
        let missing = self.missing(needs);
        if missing.is_empty() {
            return "works".to_owned();
        }
        let privilege =
            missing.iter().all(|name| matches!(self.lack(name), Some(Errno::EPERM | Errno::EACCES)));
        let remedy = if privilege {
            "run torpor as root or with the capabilities above"
        } else {
            "this kernel, or the container we are in, does not offer it"
        };
        format!("does not work without {}; {remedy}", missing.join(", "))
    }

    fn capability_list(&self) -> String {
        let all = caps::runtime::thread_all_supported();
        let mut missing: Vec<String> = all.difference(&self.capabilities).map(ToString::to_string).collect();
        let mut have: Vec<String> = self.capabilities.iter().map(ToString::to_string).collect();
        missing.sort_unstable();
        have.sort_unstable();
        match (have.len(), missing.len()) {
            (0, _) => "none".to_owned(),
            (_, 0) => "all".to_owned(),
            (have, missing_count) if have > missing_count => format!("all but {}", missing.join(", ")),
            _ => have.join(", "),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(lacking: &[(&str, Errno)]) -> Found {
        let mut probes = probe::all();
        for probe in &mut probes {
            probe.state = match lacking.iter().find(|(name, _)| *name == probe.name) {
                Some((_, errno)) => State::Missing { errno: *errno },
                None => State::Present,
            };
        }
        Found { probes, capabilities: caps::all() }
    }

    #[test]
    fn every_need_is_probed() {
        let probes = probe::all();
        for name in FOR_DUMP.iter().chain(FOR_RESTORE).chain(LADDER.iter().flat_map(|rung| rung.needs)) {
            let known = probes.iter().any(|p| p.name == *name) || name.parse::<caps::Capability>().is_ok();
            assert!(known, "{name}");
        }
    }

    #[test]
    fn verdicts() {
        assert_eq!(found(&[]).verdict(), Exit::Ok);
        assert_eq!(found(&[("soft-dirty", Errno::EINVAL)]).verdict(), Exit::Ok);
        assert_eq!(found(&[("clone3 set_tid", Errno::EPERM)]).verdict(), Exit::Permission);
        let both = [("clone3 set_tid", Errno::EPERM), ("kcmp", Errno::ENOSYS)];
        assert_eq!(found(&both).verdict(), Exit::Unfit);
        let text = found(&both).text().unwrap();
        assert!(text.contains("restore: does not work without clone3 set_tid; run torpor as root"), "{text}");
        assert!(text.contains("dump:    does not work without kcmp; this kernel"), "{text}");
    }
}
