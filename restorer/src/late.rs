//! Descriptions that can be made only when processes are there: pidfds, and files of /proc about processes.
//!
//! Both belong to a process, not to its number: made before, they would be about whoever has that number then, or
//! about nobody. So they are made here, like all others, but later, and reach the tasks by a socket that each has from
//! its birth (unix(7), `SCM_RIGHTS`). Tasks look at the message without taking it (`MSG_PEEK`, which gives descriptors
//! as well), so that any number of them get the same description.
//!
//! Until then the socket has the place of the description. A pidfd takes it when all processes are born, before
//! descriptors get their numbers. A file of /proc may be about a thread; it takes its numbers over from the socket when
//! the threads are there, with everything that needs the file itself: epoll entries, owners, locks.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use torpor_image::description::Kind;
use torpor_image::task::Task;
use torpor_image::{DescriptionId, Image};
use torpor_parasite::call;
use torpor_parasite::script::{Script, Value};

use crate::error::{Error, Result};
use crate::open::Opener;
use crate::{description, pidfd, process_file};

/// When a description can be made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Moment {
    /// Every process is born.
    Birth,
    /// Every thread is there.
    Threads,
}

/// What is made late, and how it reaches the tasks.
#[derive(Debug, Default)]
pub(crate) struct Late {
    /// What the tasks have the other end of.
    senders: Vec<(DescriptionId, OwnedFd)>,
    made: HashMap<DescriptionId, OwnedFd>,
}

impl Late {
    /// A description that has been made by now.
    pub(crate) fn get(&self, id: DescriptionId) -> Option<BorrowedFd<'_>> {
        self.made.get(&id).map(OwnedFd::as_fd)
    }
}

/// When this description is made, if not at once.
pub(crate) fn moment(image: &Image, id: DescriptionId) -> Option<Moment> {
    match &image.objects.descriptions[id.0 as usize].kind {
        Kind::PidFd(pidfd) => pidfd.pid.map(|_| Moment::Birth),
        _ => process_file::of(image, id).map(|_| Moment::Threads),
    }
}

/// What has the place of a description until it is made.
pub(crate) fn place(opener: &mut Opener<'_>, what: &str, id: DescriptionId) -> Result<OwnedFd> {
    use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
    let pair = socketpair(AddressFamily::Unix, SockType::Datagram, None, SockFlag::SOCK_CLOEXEC);
    let (place, sender) = pair.map_err(Error::open(what, "socketpair"))?;
    opener.late.senders.push((id, sender));
    Ok(place)
}

/// Makes all that can be made from this moment on, and sends it to the tasks.
pub(crate) fn make(opener: &mut Opener<'_>, now: Moment) -> Result<()> {
    let image = opener.image;
    let is_due = |id: &DescriptionId| moment(image, *id) == Some(now);
    let (due, rest) = std::mem::take(&mut opener.late.senders).into_iter().partition(|(id, _)| is_due(id));
    opener.late.senders = rest;
    for (id, sender) in <Vec<(DescriptionId, OwnedFd)>>::into_iter(due) {
        let what = opener.name(id);
        let description = &image.objects.descriptions[id.0 as usize];
        let fd = match &description.kind {
            Kind::PidFd(pidfd) => pidfd::of(&what, pidfd, description.flags)?,
            _ => process_file::open(&what, image, description)?,
        };
        description::settle(&what, &fd, description)?;
        send(&what, &sender, &fd)?;
        opener.late.made.insert(id, fd);
    }
    Ok(())
}

fn send(what: &str, to: &OwnedFd, fd: &OwnedFd) -> Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let (byte, fds) = ([std::io::IoSlice::new(b"x")], [fd.as_raw_fd()]);
    let rights = [ControlMessage::ScmRights(&fds)];
    match sendmsg::<()>(to.as_raw_fd(), &byte, &rights, MsgFlags::empty(), None) {
        Ok(_) => Ok(()),
        Err(errno) => Err(Error::Open { what: what.to_owned(), call: "sendmsg", errno }),
    }
}

/// `struct msghdr`, `struct cmsghdr` with one descriptor (linux/socket.h, 64 bit).
const MSGHDR: usize = 56;
const MSGHDR_IOV: u32 = 16;
const MSGHDR_CONTROL: u32 = 32;
const CMSG: u64 = 24;
const CMSG_FD: u32 = 16;

/// Makes a task receive what was sent to `place`; gives the number that it has then, the lowest that was free.
pub(crate) fn receive(script: &mut Script, purpose: &str, place: Value) -> Value {
    let byte = script.reserve(1);
    let part = script.words(&[0, 1]);
    script.point(part, byte);
    // Where a message comes without it, no number is left there.
    let control = script.data(&[0xff; CMSG as usize]);
    let mut words = [0u64; MSGHDR / 8];
    (words[3], words[5]) = (1, CMSG);
    let message = script.words(&words);
    script.point(message.at(MSGHDR_IOV), part);
    script.point(message.at(MSGHDR_CONTROL), control);
    let flags = libc::MSG_PEEK | libc::MSG_CMSG_CLOEXEC | libc::MSG_DONTWAIT;
    script.call_for(purpose.to_owned(), libc::SYS_recvmsg, &[place, message.into(), flags.into()], 1);
    Value::Word(control.at(CMSG_FD))
}

/// Gives files of /proc the numbers that sockets have kept for them.
pub(crate) fn plan(script: &mut Script, image: &Image, task: &Task) {
    let mut done = Vec::new();
    for descriptor in &task.descriptors {
        let id = descriptor.description;
        let Some(path) = process_file::of(image, id).filter(|_| !done.contains(&id)) else { continue };
        done.push(id);
        let name = format!("{}: fd {}, {}", task.title(), descriptor.fd, String::from_utf8_lossy(&path));
        let fd = receive(script, &name, descriptor.fd.into());
        for descriptor in task.descriptors.iter().filter(|d| d.description == id) {
            let flags = if descriptor.close_on_exec { libc::O_CLOEXEC } else { 0 };
            let args = [fd, descriptor.fd.into(), flags.into()];
            script.call_for(name.clone(), libc::SYS_dup3, &args, i64::from(descriptor.fd));
        }
        call!(script, name, libc::SYS_close, fd);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernels_structures_are_as_large() {
        assert_eq!(size_of::<libc::msghdr>(), MSGHDR);
        assert_eq!(std::mem::offset_of!(libc::msghdr, msg_iov), MSGHDR_IOV as usize);
        assert_eq!(std::mem::offset_of!(libc::msghdr, msg_control), MSGHDR_CONTROL as usize);
        // SAFETY: these compute with numbers.
        assert_eq!(unsafe { (libc::CMSG_SPACE(4), libc::CMSG_LEN(0)) }, (CMSG as u32, CMSG_FD));
    }
}
