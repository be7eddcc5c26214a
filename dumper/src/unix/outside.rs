//! Unix sockets whose other end is not part of the dump: refused by name, unless its user has said what shall
//! become of them.

use std::str::FromStr;

use torpor_kernel::ids::Pid;
use torpor_kernel::{fds, process};

/// What shall become of a Unix socket whose peer is not part of the dump.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// It is connected anew to the address of its peer when it is restored.
    Reconnect,
    /// Its peer is gone when it is restored: end of file on reading, EPIPE on writing.
    Closed,
}

/// A policy for some sockets: `reconnect` or `closed`, and after a colon a pattern for the peer's address, in
/// which `*` stands for anything and `?` for one character. An abstract address begins with `@`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExternalUnix {
    policy: Policy,
    pattern: Option<String>,
}

impl FromStr for ExternalUnix {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (word, pattern) = text.split_once(':').map_or((text, None), |(w, p)| (w, Some(p.to_owned())));
        let policy = match word {
            "reconnect" => Policy::Reconnect,
            "closed" => Policy::Closed,
            _ => return Err(format!("`{word}` is neither `reconnect` nor `closed`")),
        };
        Ok(ExternalUnix { policy, pattern })
    }
}

/// The first policy that is meant for a peer with this address.
pub(crate) fn policy(rules: &[ExternalUnix], name: &str) -> Option<Policy> {
    let fits = |r: &&ExternalUnix| r.pattern.as_ref().is_none_or(|p| matches(p.as_bytes(), name.as_bytes()));
    rules.iter().find(fits).map(|r| r.policy)
}

fn matches(pattern: &[u8], text: &[u8]) -> bool {
    // The last star, and from where in the text it was tried last.
    let (mut p, mut t, mut star) = (0, 0, None);
    while t < text.len() {
        match pattern.get(p) {
            Some(b'*') => {
                star = Some((p, t));
                p += 1;
            }
            Some(c) if *c == b'?' || *c == text[t] => {
                p += 1;
                t += 1;
            }
            _ => match star {
                Some((at, from)) => {
                    star = Some((at, from + 1));
                    p = at + 1;
                    t = from + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|c| *c == b'*')
}

/// The process with a descriptor for socket `inode`, for messages: "pid 901 (nginx)".
pub(crate) fn holder(inode: u32) -> String {
    let link = format!("socket:[{inode}]").into_bytes();
    let numbers = std::fs::read_dir("/proc").into_iter().flatten();
    let pids = numbers.filter_map(|e| e.ok()?.file_name().to_str()?.parse().ok()).map(Pid);
    let mut holders = pids.filter(|pid| *pid != Pid::this()).filter_map(|pid| {
        let all = fds::list(pid).ok()?;
        let holds = all.into_iter().any(|fd| fds::readlink(pid, fd).is_ok_and(|l| l == link));
        holds.then(|| format!("pid {pid} ({})", process::who_holds(pid.0).unwrap_or_default()))
    });
    holders.next().unwrap_or_else(|| "another process".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_rule_that_fits() {
        let rules: Vec<ExternalUnix> = ["closed:/run/*/bus", "reconnect:@x?", "closed:/dev/log"]
            .iter()
            .map(|r| r.parse().unwrap())
            .collect();
        assert_eq!(policy(&rules, "/run/user/1000/bus"), Some(Policy::Closed));
        assert_eq!(policy(&rules, "/run/bus"), None);
        assert_eq!(policy(&rules, "@xy"), Some(Policy::Reconnect));
        assert_eq!(policy(&rules, "@xyz"), None);
        assert_eq!(policy(&rules, ""), None);
        let any: ExternalUnix = "reconnect".parse().unwrap();
        assert_eq!(policy(&[any], ""), Some(Policy::Reconnect));
        assert!("reset".parse::<ExternalUnix>().is_err());
        assert!("".parse::<ExternalUnix>().is_err());
    }

    #[test]
    fn patterns() {
        for (pattern, text, wanted) in [
            ("*", "", true),
            ("", "", true),
            ("", "a", false),
            ("a*b*c", "a123b45c", true),
            ("a*b*c", "a123b45", false),
            ("*ab", "aab", true),
            ("?", "", false),
            ("**", "x", true),
        ] {
            assert_eq!(matches(pattern.as_bytes(), text.as_bytes()), wanted, "{pattern} {text}");
        }
    }
}
